"""Write tokenizer.json and gemma_shape.json, which test tokenizers and chats: `python -m tests.vectors.make_tokenizer`.

tokenizer.json has ids and texts of the `tokenizers` library, pieces of `runtime_ref`'s text streams and prompts of
jinja2. Ids of long texts are stored as their sha256. gemma_shape.json is a small tokenizer with the structure of
Gemma's: a whole text is one word, and runs of newlines and blanks are added tokens.
"""

import hashlib
import json
import random
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from exporter.bundle.chat_format import ChatFormat
from exporter.bundle.plain_chat import plain_chat
from exporter.checkpoint.special_tokens import SpecialTokens
from exporter.demo import PAIR
from runtime_ref.chat import open_template
from runtime_ref.text_parts import PartTracker
from runtime_ref.text_stream import Decode, TextStream
from runtime_ref.tokenizer import TextTokenizer
from tests.chats import CHANNELS, TEMPLATE, VERBATIM

FILE = Path(__file__).with_name("tokenizer.json")
GEMMA_SHAPE = Path(__file__).with_name("gemma_shape.json")
BUILT_IN = PAIR / "target" / "tokenizer.json"
TOKENIZERS = {"exporter/demo/pair/target/tokenizer.json": BUILT_IN, "tests/vectors/gemma_shape.json": GEMMA_SHAPE}
ENDS = SpecialTokens(2, (1,), 0)
MERGES = 160  # of the 1677 merges of the built-in pair's tokenizer

TEXTS = (
    *("", " ", "  ", "\n", "\n\n\n\n\n\n", "a", "Hello, world!", " leading and trailing ", "tabs\tand\r\nlines"),
    *("def f(x):\n    return x[0] + 1  # two\n\n\nprint(f([1]))", "a" * 50, "the " * 20 + " " * 40 + "end"),
    *(
        "na\u00efve caf\u00e9 cafe\u0301",
        "中文和日本語のテキスト",
        "👩‍💻👨‍👩‍👧 👍🏽",
        "\U00010348\U000e0001\U0010ffff",
        "\u0000\u001f\u00a0\u3000\ufeff",
    ),
    *("<bos>twice", "x<eos>y<pad><unk>", "<|turn>user\nhi<turn|>\n", "<|turn", "<0x41><0xE2>", "▁▁▁ ▁x", "<<bos>>"),
    *(
        "<bos>",
        "\ue000\ufffd\u2028\u202e",
        "1234567890.5e-3",
        "عربى \u05e2\u05d1\u05e8\u05d9\u05ea",
        "<table><td>\n</table>",
    ),
)
PARAGRAPH = 'The quick brown fox\u2019s  code:\n\n\tif (a <b> && c) { return "中"; } // 😀 naïve caf\u00e9 <|turn>\n'
BROKEN = ("é", "中", "😀", "👩‍💻", "\U00010348")


def gemma_shape() -> str:
    """Return the text of gemma_shape.json."""
    tokenizer = json.loads(BUILT_IN.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    merges = model["merges"][:MERGES]
    runs = (
        ["\n" * n for n in range(1, 9)] + ["▁" * n for n in range(2, 9)] + ["<table>", "</table>", "<|turn>", "<turn|>"]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(
        {part for merge in merges for part in merge if len(part) == 1} | set(".,:;()[]{}<>|/=\"'01") | {"中"}
    )
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *runs, *bytes_, *letters, *("".join(merge) for merge in merges)]
    model["vocab"] = {name: i for i, name in enumerate(dict.fromkeys(names))}
    model["merges"] = merges
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] = [
        {"id": i, "content": name, **flags, "special": name in special}
        for name, i in model["vocab"].items()
        if name in special or name in runs
    ]
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    return json.dumps(tokenizer, ensure_ascii=False, indent=0) + "\n"


def texts(tokenizer: Tokenizer, generator: random.Random) -> list[dict[str, object]]:
    """Return texts and the ids of their prompts."""
    vocab = sorted(tokenizer.get_vocab())
    rows: list[dict[str, object]] = [{"text": text, "ids": prompt(tokenizer, text)} for text in TEXTS]
    for _ in range(40):
        parts = generator.choices([*vocab, *BROKEN, " ", "\n", "<", "▁"], k=generator.randrange(1, 20))
        text = "".join(parts).replace("▁", generator.choice("▁ "))
        rows.append({"text": text, "ids": prompt(tokenizer, text)})
    for text in (PARAGRAPH, "anthein "):
        times = 20_000 // len(text)
        ids = prompt(tokenizer, text * times)
        rows.append({"text": text, "times": times, "count": len(ids), "sha256": sha256(ids)})
    return rows


def prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text, with one beginning-of-text token before them."""
    ids = list(tokenizer.encode(text, add_special_tokens=False).ids)
    return ids if ids[:1] == [ENDS.bos] else [ENDS.bos, *ids]


def sha256(ids: list[int]) -> str:
    """Return the digest of ids, written in decimal with commas between them."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def streams(tokenizer: Tokenizer, generator: random.Random) -> list[dict[str, object]]:
    """Return ids, their text, and the piece of text that each id completes; some texts end at a stop string."""
    decode = decoding(tokenizer)
    byte = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    size = tokenizer.get_vocab_size()
    rows: list[dict[str, object]] = []
    for number in range(60):
        ids: list[int] = []
        for _ in range(generator.randrange(8)):
            spelled = [byte[b] for b in generator.choice(BROKEN).encode()]
            parts = ([generator.randrange(size + 3)], spelled, spelled[:-1], [generator.choice(byte)])
            ids += generator.choice([*parts, prompt(tokenizer, generator.choice(TEXTS))[1:9]])
        text = decode(ids)
        at = generator.randrange(len(text) or 1)
        stop = [part for part in (text[at : at + 1 + number % 3], "zz") if part] if number % 2 else []
        stream = TextStream(decode, stop)
        pieces = [stream.add(token, i == len(ids) - 1).text for i, token in enumerate(ids)]
        rows.append({"ids": ids, "text": text, "stop": stop, "pieces": pieces, "stopped": stream.stopped})
    return rows


def decoding(tokenizer: Tokenizer) -> Decode:
    """Return what converts ids to text with a tokenizer."""
    return lambda ids, special=False: tokenizer.decode(list(ids), skip_special_tokens=not special)


def thoughtful_streams(tokenizer: Tokenizer, generator: random.Random) -> list[dict[str, object]]:
    """Return streams as `streams` does, with one channel or two; some begin inside one.

    Each has the part and that part's text of each token, and what each channel holds.
    """
    decode = decoding(tokenizer)
    rows: list[dict[str, object]] = []
    for number in range(40):
        begin, end, *others = generator.sample(range(tokenizer.get_vocab_size()), 4)
        channels = {"thought": (begin, end), "tool_call": (others[0], others[1])}
        channels = channels if number % 2 else {"thought": (begin, end)}
        marks = [mark for channel in channels.values() for mark in channel]
        words = [prompt(tokenizer, generator.choice(TEXTS))[1:6] for _ in range(6)]
        ids = [token for word in words for token in (*word, generator.choice(marks))][: generator.randrange(1, 40)]
        before = generator.choices((1, 3, *marks), k=number % 4)
        # What a thought may begin and end with.
        held = decode(next((word for word in words if word), []))
        parts = {"thought": {"before": held[: number % 5], "after": held[-1:]}} if number % 3 else {}
        shown = TextStream(decode, (), PartTracker(channels, ENDS.eos, before))
        whole = "".join(shown.add(token).text for token in ids)
        at = generator.randrange(len(whole) or 1)
        stop = [whole[at : at + 3]] if number % 3 == 0 and whole[at : at + 3] else []
        stream = TextStream(decode, stop, PartTracker(channels, ENDS.eos, before), parts)
        pieces = [stream.add(token, i == len(ids) - 1) for i, token in enumerate(ids)]
        row = {"ids": ids, "text": decode(ids), "stop": stop, "pieces": [piece.text for piece in pieces]}
        row |= {"of_parts": [[piece.part, piece.part_text] for piece in pieces], "stopped": stream.stopped}
        opened = [[channel.name, channel.start, channel.text, channel.closed] for channel in stream.channels]
        rows.append({**row, "channels": channels, "parts": parts, "prompt": before, "opened": opened})
    return rows


def chats(template: str, generator: random.Random) -> tuple[ChatFormat, list[dict[str, object]]]:
    """Return a template's chat format, and chats with the prompts that the template renders."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copyfile(BUILT_IN, directory / "tokenizer.json")
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        form = plain_chat(directory, ENDS).chat
        render = open_template(directory, TextTokenizer(directory, ENDS)).render
        assert form
        blanks = [
            "\t",
            "\u001c",
            "\u0085",
            "\u00a0",
            "\u1680",
            "\u200a",
            "\u2029",
            "\u202f",
            "\u205f",
            "\u3000",
            "\u200b",
        ]
        pieces = ["a", "é", " ", "\n", *generator.sample(blanks, 6), "<|channel>", "<channel|>", "<turn|>", "<bos>"]
        rows: list[dict[str, object]] = []
        for number in range(40):
            roles = [("user", "assistant")[i % 2] for i in range(2 * (number % 4) + 1)]
            if not form.alternate:
                generator.shuffle(roles)
            if "system" in form.turns and number % 3 == 0:
                roles.insert(0, "system")
            contents = ("".join(generator.choices(pieces, k=generator.randrange(8))) for _ in roles)
            messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            rows.append({"messages": messages, "prompt": render(messages)})
    return form, rows


def vectors() -> dict[str, list[Any]]:
    """Return the content of tokenizer.json: tokenizers, chat formats, and rows that refer to them by number."""
    generator = random.Random(0)
    content: dict[str, list[Any]] = {"files": [], "texts": [], "streams": [], "formats": [], "chats": []}
    for number, (name, path) in enumerate(TOKENIZERS.items()):
        tokenizer = Tokenizer.from_str(gemma_shape() if path == GEMMA_SHAPE else path.read_text(encoding="utf-8"))
        content["files"].append({"file": name, "bos": ENDS.bos})
        content["texts"] += [{"file": number, **row} for row in texts(tokenizer, generator)]
        content["streams"] += [{"file": number, **row} for row in streams(tokenizer, generator)]
    for number, path in enumerate(TOKENIZERS.values()):
        tokenizer = Tokenizer.from_file(str(path))
        content["streams"] += [{"file": number, **row} for row in thoughtful_streams(tokenizer, random.Random(number))]
    for number, template in enumerate((TEMPLATE, CHANNELS, VERBATIM)):
        form, rows = chats(template, generator)
        content["formats"].append(asdict(form))
        content["chats"] += [{"format": number, **row} for row in rows]
    return content


def text() -> str:
    """Return the text of tokenizer.json, a row in each line."""
    parts = (f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in vectors().items())
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    GEMMA_SHAPE.write_text(gemma_shape(), encoding="utf-8")
    FILE.write_text(text(), encoding="utf-8")
