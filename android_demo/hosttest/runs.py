"""Generate texts in Kotlin and in Python, and compare them."""

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime_ref import decoder as decoder_module
from runtime_ref import streaming, token_stream
from runtime_ref.chat import CHAT_TEMPLATE, open_template
from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import load_engine
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import uniform
from runtime_ref.tokenizer import TOKENIZER, TextTokenizer

BUILD = Path(__file__).parent.parent / "build"
# What a request says where it says nothing else; Main.kt reads every key.
DEFAULTS: dict[str, Any] = {
    **{"max_new_tokens": 60, "num_draft_tokens": 4, "stop": []},
    **{"temperature": 0.0, "top_p": 1.0, "top_k": 64, "seed": "0"},
    **{"suppress": [], "logit_bias": {}},
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "when_full": "stop",
}
# Those that `Decoder.stream` takes as they are.
OPTIONS = (
    *("max_new_tokens", "num_draft_tokens", "temperature", "top_p", "top_k", "stop", "suppress"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "when_full"),
)


def clock() -> Any:
    """Return the simulated clock of Main.kt, as a module `time`."""
    now, reads = 0.0, 0

    def seconds() -> float:
        nonlocal now, reads
        now += 0.001 * (1 + uniform(7, reads))
        reads += 1
        return now

    return SimpleNamespace(perf_counter=seconds)


def in_python(bundle: Path, requests: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Generate the texts with runtime_ref."""
    manifest = read_manifest(bundle)
    tokenizer = TextTokenizer(bundle, manifest) if (bundle / TOKENIZER).exists() else None
    planner = DraftLength(manifest.max_draft_tokens, Costs(manifest.max_draft_tokens, manifest.row_multiple))
    template = open_template(bundle, tokenizer) if tokenizer and (bundle / CHAT_TEMPLATE).exists() else None
    decoder = streaming.Decoder(bundle, load_engine(bundle, manifest, 1), tokenizer, planner, template=template)
    monkeypatch.setattr(decoder_module, "time", clock())
    results = []
    for text in requests:
        rounds: list[dict[str, Any]] = []

        def recorded(*arguments: Any, rounds: list[dict[str, Any]] = rounds) -> Any:
            for done in decoder_module.rounds(*arguments):
                rounds.append({"drafts": list(done.drafts), "accepted": done.accepted, "tokens": done.tokens})
                yield done

        monkeypatch.setattr(token_stream, "rounds", recorded)
        options = {key: text[key] for key in OPTIONS}
        biases = {int(token): bias for token, bias in text["logit_bias"].items()}
        chats = isinstance(text["prompt"][:1], list) and isinstance(text["prompt"][0], dict)
        write = decoder.chat if chats else decoder.stream
        stream = write(text["prompt"], **options, seed=int(text["seed"]), logit_bias=biases)
        pieces, logprobs = [], []
        for token in stream:
            pieces.append(token.text)
            logprobs.append(token.logprob)
            if len(stream.tokens) == text.get("cancel_after"):
                stream.cancel()
        stats = stream.stats
        results.append(
            {
                "tokens": stream.tokens,
                "pieces": pieces,
                "logprobs": logprobs,
                "rounds": rounds,
                "text": stream.text,
                "finish_reason": stats.finish_reason,
                "drafted": stats.drafted,
                "accepted": stats.accepted,
                "num_rounds": stats.rounds,
                "reused": stats.reused_tokens,
                "dropped_tokens": stats.dropped_tokens,
                "dropped_messages": stream.dropped_messages,
                "tokens_left": stream.tokens_left,
                "decode_seconds": stats.decode_seconds,
                "drafted_by_position": stats.drafted_by_position,
                "accepted_by_position": stats.accepted_by_position,
                "sources": {source: counts.drafted for source, counts in stats.sources.items()},
            }
        )
    return results


def in_kotlin(
    bundle: Path, requests: list[dict[str, Any]], directory: Path, session: Path | None = None
) -> list[dict[str, Any]]:
    """Generate the texts with the app's core; open the session before and after each, and save it, if one is given."""
    file = directory / "texts.json"
    file.write_text(json.dumps(requests))
    command = ["bash", BUILD / "host", bundle, file, *([session] if session else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compare(requests: list[dict[str, Any]], kotlin: list[dict[str, Any]], python: list[dict[str, Any]]) -> list[str]:
    """Return a line for each text that differs, with the parts that do."""
    wrong = []
    for text, actual, expected in zip(requests, kotlin, python, strict=True):
        pairs = zip(actual.pop("logprobs"), expected.pop("logprobs"), strict=False)
        # Two libraries' exponentials differ in the last bit.
        close = all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in pairs)
        close &= math.isclose(actual.pop("decode_seconds"), expected.pop("decode_seconds"), rel_tol=1e-9)
        if actual != expected or not close:
            parts = [key for key in expected if actual[key] != expected[key]] or ["logprobs or seconds"]
            wrong.append(f"{text | {'prompt': str(text['prompt'])[:40]}}: {', '.join(parts)}")
    return wrong
