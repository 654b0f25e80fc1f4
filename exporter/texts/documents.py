"""The texts of this package: prose in many languages, code and chats, written for it; one half measures the other."""

from dataclasses import dataclass
from pathlib import Path

CALIBRATION = "calibration"
HELD_OUT = "held_out"

_MARK = "=== "  # begins the line before each document: its kind and its language
_ROLES = {"user: ": "user", "model: ": "assistant"}  # begin the turns of a chat


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        kind: "prose", "code" or "chat".
        language: a two-letter code, or the name of a programming language.
        text: the text; turns of a chat begin with "user: " or "model: ".
    """

    kind: str
    language: str
    text: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns of a chat, as chat templates take them: `role` and `content`."""
        messages: list[dict[str, str]] = []
        for line in self.text.splitlines(keepends=True):
            mark = next((mark for mark in _ROLES if line.startswith(mark)), None)
            if mark is not None:
                messages.append({"role": _ROLES[mark], "content": line.removeprefix(mark)})
            else:
                messages[-1]["content"] += line
        return [{**message, "content": message["content"].rstrip()} for message in messages]


def documents(name: str) -> list[Document]:
    """Return the documents of a set, `CALIBRATION` or `HELD_OUT`; no text is in both."""
    content = (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8")
    found = []
    for part in ("\n" + content).split(f"\n{_MARK}")[1:]:
        heading, _, text = part.partition("\n")
        kind, language = heading.split()
        found.append(Document(kind, language, text.strip()))
    return found
