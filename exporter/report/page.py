"""The report as one HTML page."""

from pathlib import Path
from typing import Any

import jinja2

from exporter.files import human_bytes
from exporter.report.figures import FEW, FIGURES

TEMPLATE = "report.html.jinja"


def render(facts: dict[str, Any]) -> str:
    """The page: one file that asks for no other."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"human_bytes": human_bytes, "percent": percent, "found": found, "signs": signs}
    pictures = {name: draw(facts) for name, (needs, draw) in FIGURES.items() if needs(facts)}
    return environment.get_template(TEMPLATE).render(facts=facts, pictures=pictures, few=FEW)


def percent(share: float | None) -> str:
    """A share as people read it."""
    return "none" if share is None else f"{100 * share:.1f}\u00a0%"


def found(check: dict[str, Any]) -> str:
    """What a check found: its error beside the tolerance, or words."""
    return check["detail"] if check["error"] is None else f"{check['error']:.1e} (allowed {check['tolerance']:.0e})"


def signs(text: str) -> str:
    """A token's text, with a sign where it breaks the line: an underlined line break would not show."""
    return text.replace("\n", "\u21b5\n")
