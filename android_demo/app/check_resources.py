"""Check the app's resources without Android: contrast, touch targets, references, texts.

`python android_demo/app/check_resources.py` prints the contrast of every pair of text and background in both themes,
and then each fault on a line. The exit status is 1 if there is any.
"""

import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

MAIN = Path(__file__).parent / "src" / "main"
ANDROID = "{http://schemas.android.com/apk/res/android}"
THEMES = {"light": ("values",), "dark": ("values-night", "values")}  # folders; the first that has a colour counts
TEXT_CONTRAST, ICON_CONTRAST = 4.5, 3.0  # WCAG 2.2: 1.4.3 and 1.4.11
TARGET_DP = 48

# Text, background and smallest contrast of pairs that code sets or the framework draws: dialogs and radio buttons.
OTHER_PAIRS = (
    ("error", "background", TEXT_CONTRAST),
    ("text", "surface", TEXT_CONTRAST),
    ("accent", "surface", TEXT_CONTRAST),
    ("accent", "background", ICON_CONTRAST),
    ("icon_foreground", "icon_background", ICON_CONTRAST),
)
TEXTS = {"TextView", "Button", "RadioButton", "EditText", "Switch"}
TARGETS = {"Button", "ImageButton", "RadioButton", "EditText", "Switch"}
TEXT_ATTRIBUTES = ("text", "hint", "contentDescription", "label", "title", "tooltipText")
ABSOLUTE = re.compile(r"(layout_)?(margin|padding|alignParent)(Left|Right)$")


def parsed(pattern: str) -> dict[Path, ET.Element]:
    """Return root elements of XML files by path."""
    return {path: ET.parse(path).getroot() for path in sorted((MAIN / "res").glob(pattern))}


LAYOUTS, COLORS, DRAWABLES = parsed("layout*/*.xml"), parsed("color/*.xml"), parsed("drawable*/*.xml")
VALUES, MIPMAPS = parsed("values*/*.xml"), parsed("mipmap*/*.xml")
MANIFEST = {MAIN / "AndroidManifest.xml": ET.parse(MAIN / "AndroidManifest.xml").getroot()}
CODE = {path: path.read_text() for path in sorted(MAIN.glob("kotlin/**/*.kt"))}
XML = {**LAYOUTS, **COLORS, **DRAWABLES, **VALUES, **MIPMAPS, **MANIFEST}


def values(tag: str, folder: str = "values") -> dict[str, ET.Element]:
    """Return elements with a tag in a folder of values, by name."""
    items = (item for path, root in VALUES.items() if path.parent.name == folder for item in root.iter(tag))
    return {item.attrib["name"]: item for item in items}


STYLES = values("style")


def styled(style: str, name: str) -> str | None:
    """Return an attribute's value in one of the app's styles or its parents; None if it has none."""
    element = STYLES.get(style.removeprefix("@style/"))
    if element is None:
        return None
    for item in element:
        if item.attrib["name"] == f"android:{name}":
            return item.text
    return styled(element.attrib.get("parent", ""), name)


def attribute(view: ET.Element, name: str) -> str | None:
    """Return an attribute of a view, its own or its style's."""
    return view.get(ANDROID + name) or styled(view.get("style", ""), name)


def color(reference: str, theme: str, state: str = "enabled") -> str:
    """Return #RRGGBB of a reference to a colour, a list of colours or a drawable."""
    resource_type, name = reference.removeprefix("@").split("/")
    for path, root in {**COLORS, **DRAWABLES}.items():
        if path.parent.name == resource_type and path.stem == name:
            return color(inner(root, state), theme, state)
    return next(colors[name].text or "" for folder in THEMES[theme] if name in (colors := values("color", folder)))


def inner(root: ET.Element, state: str) -> str:
    """Return the colour or drawable that fills a list of colours, a shape or a ripple."""
    if root.tag == "selector":
        fits = (i for i in root if state == "disabled" or i.get(ANDROID + "state_enabled") != "false")
        return next(fits).attrib[ANDROID + "color"]
    if (solid := root.find(".//solid")) is not None:
        return solid.attrib[ANDROID + "color"]
    return next(fill for i in root.iter() if (fill := i.get(ANDROID + "drawable") or i.get(ANDROID + "fillColor")))


def contrast(first: str, second: str) -> float:
    """Return WCAG's contrast ratio of two colours, #RRGGBB."""
    lights = []
    for rgb in (first, second):
        channels = (int(rgb[at : at + 2], 16) / 255 for at in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def views(root: ET.Element, background: str) -> Iterator[tuple[ET.Element, str]]:
    """Yield every view, with the background of it or of the nearest view around it."""
    background = attribute(root, "background") or background
    yield root, background
    for child in root:
        yield from views(child, background)


def pairs() -> dict[tuple[str, str], float]:
    """Return the smallest contrast of each pair of foreground and background references in the layouts."""
    needed = {(f"@color/{text}", f"@color/{back}"): smallest for text, back, smallest in OTHER_PAIRS}
    window = styled("App", "windowBackground") or ""
    for root in LAYOUTS.values():
        for view, background in views(root, window):
            if view.tag in TEXTS:
                text = attribute(view, "textColor") or styled("App", "textColorPrimary") or ""
                needed[text, background] = TEXT_CONTRAST
            if view.tag == "EditText":
                needed[styled("App", "textColorHint") or "", background] = TEXT_CONTRAST
            if tint := attribute(view, "tint"):
                needed[tint, background] = ICON_CONTRAST
    return needed


def low_contrast() -> Iterator[str]:
    """Print the contrast of all pairs, and yield those below the smallest; a disabled icon may have any."""
    for (front, back), smallest in sorted(pairs().items()):
        for theme in THEMES:
            states = ("disabled", "enabled")
            drawn = {(color(front, theme, state), color(back, theme, state)): state for state in states}
            for both, state in drawn.items():  # once, where a disabled view looks no different
                ratio = contrast(*both)
                line = f"{front} on {back}, {state}, {theme}: {ratio:.1f}"
                print(line)
                if ratio < smallest and (state == "enabled" or smallest == TEXT_CONTRAST):
                    yield f"{line}, expected {smallest} or more"


def small_targets() -> Iterator[str]:
    """Yield views that can be tapped and have no minimum size of a touch target."""
    for path, root in LAYOUTS.items():
        for view in root.iter():
            if view.tag not in TARGETS and not view.get(ANDROID + "clickable") and not view.get(ANDROID + "onClick"):
                continue
            for side in ("Height", "Width"):
                sizes = [attribute(view, f"min{side}"), attribute(view, f"layout_{side.lower()}")]
                dps = [float(size[:-2]) for size in sizes if size and size.endswith("dp")]
                stretched = side == "Width" and (attribute(view, "layout_weight") or sizes[1] == "match_parent")
                if not stretched and max(dps, default=0) < TARGET_DP:
                    yield f"{path.name}: {described(view)} has no minimum {side.lower()} of {TARGET_DP}dp"


def defined() -> set[str]:
    """Return every resource as type/name."""
    tables = {f"{tag}/{name}" for tag in ("string", "color", "style") for name in values(tag)}
    files = {f"{path.parent.name.split('-')[0]}/{path.stem}" for path in XML if path.parent.parent.name == "res"}
    return tables | files | {f"id/{name}" for path in LAYOUTS for name in ids(path)}


def used() -> dict[str, str]:
    """Return every resource that is referred to as type/name, and a file that refers to it."""
    files: dict[str, str] = {}
    for path, root in XML.items():
        texts = [text for view in root.iter() for text in (*view.attrib.values(), view.text or "")]
        for tag, name in re.findall(r"@(\w+)/([\w.]+)", "\n".join(texts)):
            files[f"{tag}/{name}"] = path.name
        files |= {f"style/{s.attrib['parent']}": path.name for s in root.iter("style") if s.get("parent") in STYLES}
    for path, code in CODE.items():
        files |= {f"{tag}/{name}": path.name for tag, name in re.findall(r"(?<!android\.)\bR\.(\w+)\.(\w+)", code)}
    return files


def ids(path: Path) -> set[str]:
    """Return the ids of a layout file, without those of files that it includes."""
    return {view.get(ANDROID + "id", "").removeprefix("@+id/") for view in LAYOUTS[path].iter()} - {""}


def all_ids(path: Path) -> set[str]:
    """Return the ids of a layout file and of files that it includes."""
    included = (view.attrib["layout"].removeprefix("@layout/") for view in LAYOUTS[path].iter("include"))
    return ids(path).union(*(all_ids(MAIN / "res" / "layout" / f"{name}.xml") for name in included))


def references() -> Iterator[str]:
    """Yield references to missing resources, resources without references, and differences between variants."""
    exists, named = defined(), used()
    for name, where in sorted(named.items()):
        if name not in exists:
            yield f"{where}: there is no {name}"
    for name in sorted(exists - named.keys()):
        if not name.startswith(("id/", "values/")):
            yield f"{name} is not used"
    for path in LAYOUTS:
        usual = MAIN / "res" / "layout" / path.name
        if differ := all_ids(path) ^ all_ids(usual):
            yield f"{path.parent.name}/{path.name}: ids are not those of layout/: {', '.join(sorted(differ))}"
    for name in values("color", "values-night").keys() ^ values("color").keys():
        if not name.startswith("icon_"):
            yield f"color {name} is not in both themes"


def texts() -> Iterator[str]:
    """Yield texts outside strings.xml, sizes that do not scale, sides that do not mirror, undescribed images."""
    for path, root in {**LAYOUTS, **MANIFEST}.items():
        for view in root.iter():
            for key, value in view.attrib.items():
                name = key.removeprefix(ANDROID)
                if name in TEXT_ATTRIBUTES and not value.startswith("@string/"):
                    yield f"{path.name}: {described(view)} has the text '{value}'; put it into strings.xml"
                if ABSOLUTE.match(name) or (name.endswith("ravity") and re.search("left|right", value)):
                    yield f"{path.name}: {described(view)} has {name} {value}; use start or end"
                if name == "textSize" and not value.endswith("sp"):
                    yield f"{path.name}: {described(view)} has textSize {value}; use sp"
            if view.tag in ("ImageButton", "ImageView") and not view.get(ANDROID + "contentDescription"):
                yield f"{path.name}: {described(view)} has no contentDescription"
    for path, code in CODE.items():
        for line in re.findall(r'.*(?:\.text = |setText\(|makeText\([^)]*|setTitle\(|setHint\()"\w.*', code):
            yield f"{path.name}: hard-coded text: {line.strip()}"


def described(view: ET.Element) -> str:
    """Return tag and id of a view."""
    return f"{view.tag} {view.get(ANDROID + 'id', '').removeprefix('@+id/')}".strip()


if __name__ == "__main__":
    wrong = [line for check in (low_contrast, small_targets, references, texts) for line in check()]
    print("\n".join(wrong) or "resources are fine", file=sys.stderr)
    sys.exit(bool(wrong))
