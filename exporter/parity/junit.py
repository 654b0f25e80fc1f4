"""The checks of parity as JUnit XML, which build pipelines read."""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from exporter.files import check_file, write_file
from exporter.parity.checks import Check
from runtime_ref.errors import InputError

ROOT, SUITES = "testsuites", "parity"
# What XML 1.0 cannot hold, not even escaped.
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check_junit(file: Path) -> None:
    """Check that a file can be written, before any work is done; one of an earlier run is removed.

    Args:
        file: the file to write.

    Raises:
        InputError: the file cannot be written, or exists and is not such a document.
    """
    if file.is_file() and not _is_junit(file):
        raise InputError(f"{file}: exists and is no JUnit XML of an earlier `parity`; choose another file")
    check_file(file, force=True)
    file.unlink(missing_ok=True)  # what ends early must not leave the checks of another run


def write_junit(file: Path, bundle: Path, checks: Sequence[Check]) -> None:
    """Write checks as one test suite: a test case for each, named by its stage and output.

    Args:
        file: the file to write.
        bundle: the bundle that was checked, the suite's name.
        checks: all checks.

    Raises:
        InputError: the file cannot be written.
    """
    failures = sum(not check.passed for check in checks)
    counts = {"tests": str(len(checks)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element(ROOT, {"name": SUITES, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(str(bundle)), **counts})
    for check in checks:
        case = {"classname": f"parity.{check.stage}", "name": _xml(check.output)}
        element = ElementTree.SubElement(suite, "testcase", case)
        if check.passed:
            ElementTree.SubElement(element, "system-out").text = _xml(check.result)
        else:
            ElementTree.SubElement(element, "failure", {"message": _xml(check.result or "failed")})
    ElementTree.indent(root)
    write_file(file, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _is_junit(file: Path) -> bool:
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError, ValueError, LookupError):  # the last two: of an unknown encoding
        return False
    return root.tag == ROOT and root.get("name") == SUITES


def _xml(text: str) -> str:
    return NOT_XML.sub("\ufffd", text)
