"""The HTML of the report: the template `page.html.jinja`, filled in."""

from pathlib import Path
from typing import Any

import jinja2

from exporter.files import human_bytes
from exporter.report.figures import FIGURES, MIN_RELIABLE_DRAFTS

TEMPLATE = "page.html.jinja"


def render(document: dict[str, Any]) -> str:
    """Return the report page, one HTML file that loads no other file.

    Args:
        document: the result of `measure_report`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "human_bytes": human_bytes,
        "percent": percent,
        "outcome": outcome,
        "mark_line_breaks": mark_line_breaks,
    }
    pictures = {name: draw(document) for name, (has_data, draw) in FIGURES.items() if has_data(document)}
    return environment.get_template(TEMPLATE).render(document=document, pictures=pictures, few=MIN_RELIABLE_DRAFTS)


def percent(ratio: float | None) -> str:
    """Format a ratio from 0 to 1 as a percentage with one decimal; None is `none`."""
    return "none" if ratio is None else f"{100 * ratio:.1f}\u00a0%"


def outcome(check: dict[str, Any]) -> str:
    """Format the result of a parity check, given as `Check.as_dict` has it: its error and tolerance, or its detail."""
    return check["detail"] if check["error"] is None else f"{check['error']:.1e} (allowed {check['tolerance']:.0e})"


def mark_line_breaks(text: str) -> str:
    """Put a visible sign before each line break of a token's text: an underlined line break would not show."""
    return text.replace("\n", "\u21b5\n")
