"""Write the golden bundles of the current format, one for each backend, and the tokens that they give.

Run once when a format is released: `python -m tests.golden.make_golden`. The bundles of a released format are never
made again, so that every later reader is tried on what was written then.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.quantization.recipes import RECIPES
from runtime_ref.manifest import FORMAT_VERSION
from runtime_ref.streaming import Decoder, open_decoder
from tests.chats import TEMPLATE
from tests.pairs import SHAPES, save_pair
from tests.vectors.make_tokenizer import gemma_shape

GOLDEN = Path(__file__).parent
TEXTS = "texts.json"
MAX_SEQ_LEN = 400  # a sliding buffer moves once in so many tokens
# The vocabulary of `gemma_shape`, which has turn tokens, and as few and small layers as show E2B's structure.
SHAPE = replace(SHAPES["e2b"], vocab=496, hidden=32, inner=48, ple=4, head_dim=8, full_head_dim=16)
MESSAGES = [
    {"role": "user", "content": "Is the table set?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "Thank you. Who did it?"},
]
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "the table of the day", "max_new_tokens": 40},
    {"prompt": [2, 40, 41, 300, 77, 21, 8] * 45, "max_new_tokens": 60},
    {"prompt": "a colour, naïve 日本", "max_new_tokens": 40, "temperature": 1.0, "top_p": 0.95, "seed": 7},
    {"messages": MESSAGES, "max_new_tokens": 40, "temperature": 0.7, "top_k": 20, "seed": 3},
]


def start(decoder: Decoder, request: dict[str, Any]) -> Any:
    """Begin the text that a request asks for."""
    options = {name: value for name, value in request.items() if name not in ("prompt", "messages")}
    if "messages" in request:
        return decoder.chat(request["messages"], **options)
    return decoder.stream(request["prompt"], **options)


def written(bundle: Path, num_draft_tokens: int | None) -> Iterator[dict[str, Any]]:
    """Yield the tokens and the text of each request, as a bundle gives them."""
    decoder = open_decoder(bundle, threads=1)
    for request in REQUESTS:
        stream = start(decoder, {**request, "num_draft_tokens": num_draft_tokens})
        tokens = [token.id for token in stream]
        yield {"tokens": tokens, "text": stream.text, "finish_reason": stream.stats.finish_reason}


def main() -> None:
    """Write the bundles and their texts, which both backends must agree on."""
    output = GOLDEN / f"format{FORMAT_VERSION}"
    output.mkdir()
    texts = []
    with tempfile.TemporaryDirectory() as temporary:
        target, drafter = save_pair(SHAPE, Path(temporary))
        (target / "tokenizer.json").write_text(gemma_shape(), encoding="utf-8")
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
        (target / "tokenizer_config.json").write_text(json.dumps(tokens))
        (target / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": [1, 22]}))
        for backend in ("onnx", "executorch"):
            options = ExportOptions(backend, RECIPES["fp32"], MAX_SEQ_LEN)
            export_bundle(open_pair(target, drafter), output / backend, options)
            texts += [list(written(output / backend, drafts)) for drafts in (0, 4)]
            shutil.rmtree(output / f"{backend}.device")
    assert all(others == texts[0] for others in texts)
    results = [{**request, **result} for request, result in zip(REQUESTS, texts[0], strict=True)]
    rows = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
    (output / TEXTS).write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
