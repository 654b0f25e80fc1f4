"""The public side of the Kotlin library: what apps are compiled against, as `javap` shows it.

`python hosttest/surface.py` writes it to MODULE/api/MODULE.api, after `make android-test` has compiled the modules. A
change of these files is a change for apps, and belongs into CHANGELOG.md.
"""

import re
import subprocess
from pathlib import Path

ANDROID = Path(__file__).parent.parent
PARTS = ANDROID / "build/parts"
# Classes of each module, below the folder of compiled parts.
MODULES = {
    "core": "api/core/gemmamtp",
    "engine-onnx": "api/engines/gemmamtp/onnx",
    "engine-executorch": "api/engines/gemmamtp/executorch",
}


def surface(module: str) -> str:
    """Return the public declarations of a module, class by class, without what the compiler adds."""
    files = sorted((PARTS / MODULES[module]).rglob("*.class"))
    text = subprocess.run(["javap", "-public", *files], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"(?m)^Compiled from .*\n|^.*(\$default|access\$|DefaultConstructorMarker).*\n", "", text)
    blocks = re.split(r"(?m)(?<=^}\n)", text)
    return "\n".join(block for block in blocks if not re.search(r"DefaultImpls|\$\$|Kt \{\n\}", block))


def file_of(module: str) -> Path:
    """Return the file that has a module's public side."""
    return ANDROID / module / "api" / f"{module}.api"


if __name__ == "__main__":
    for name in MODULES:
        file_of(name).parent.mkdir(exist_ok=True)
        file_of(name).write_text(surface(name))
