"""Kotlin on bundles of both backends gives the tokens, rounds, accepted drafts, text and statistics of runtime_ref.

Run by `make android-test`, which builds the app's core and the bundles.
"""

import json
import math
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.bundle.chat_format import chat_format
from exporter.checkpoint.special_tokens import SpecialTokens
from runtime_ref import decoder as decoder_module
from runtime_ref import streaming
from runtime_ref.chat import CHAT_TEMPLATE, open_template
from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import load_engine
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import uniform
from runtime_ref.tokenizer import TextTokenizer

BUILD = Path(__file__).parent.parent / "build"
BUNDLES = ("onnx-fp32", "onnx-int4", "executorch-fp32")
TEXT = (
    "Return the exception instance, or None if the future is done. The event loop calls the given function with"
    " the current context, and the result is a list of tuples.\n\n"
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + '] ' + message['content'] | trim + '\\n' }}"
    "{% endfor %}{{ '[assistant] ' }}"
)
DEFAULTS = {"max_new_tokens": 60, "num_draft_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": 64, "seed": "0"}


def texts(bundle: Path) -> list[dict[str, Any]]:
    """Return prompts and options: all numbers of drafts, greedy and sampled, short and past the sliding window."""
    manifest = read_manifest(bundle)
    ids = TextTokenizer(bundle, manifest).encode(TEXT * 40)[: manifest.max_seq_len]
    max_drafts = manifest.max_draft_tokens
    greedy = [
        {"prompt": prompt, "num_draft_tokens": drafts}
        for prompt in (ids[:1], ids[:2], ids[:37], ids[: manifest.sliding_window + 70])
        for drafts in (0, 1, 4, max_drafts, None)
    ]
    sampled = [
        {"prompt": ids[:20], "num_draft_tokens": drafts, **sampling}
        for sampling in (
            {"temperature": 1.0, "seed": str(2**64 - 1)},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": "3"},
            {"temperature": 2.5, "top_p": 0.99, "seed": "11"},
        )
        for drafts in (0, 2, max_drafts, None)
    ]
    ends = [
        {"prompt": ids[: manifest.max_seq_len - 9], "num_draft_tokens": drafts, "max_new_tokens": 50}
        for drafts in (0, 4, None)
    ]
    budgets = [{"prompt": ids[:12], "num_draft_tokens": 4, "max_new_tokens": count} for count in (1, 2, 3)]
    written = [
        {"prompt": "Return the", "num_draft_tokens": None, "max_new_tokens": 120},
        {"prompt": "Return the exception", "num_draft_tokens": None, "stop": ["\n", ". "]},
        {"prompt": "naïve 🏳️‍🌈 日本語\t\r\n", "temperature": 1.5, "seed": "5", "max_new_tokens": 100},
        {"prompt": TEXT, "cancel_after": 7},
        {"prompt": "", "num_draft_tokens": 3},
    ]
    # A conversation: each prompt begins with the one before and its answer.
    conversation = [{"prompt": TEXT * n, "num_draft_tokens": None, "max_new_tokens": 20} for n in (1, 2, 3)]
    runs = [*greedy, *sampled, *ends, *budgets, *written, *conversation]
    return [DEFAULTS | {"stop": []} | run for run in runs]


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
    tokenizer = TextTokenizer(bundle, manifest)
    planner = DraftLength(manifest.max_draft_tokens, Costs(manifest.max_draft_tokens, manifest.row_multiple))
    template = open_template(bundle, tokenizer) if (bundle / CHAT_TEMPLATE).exists() else None
    decoder = streaming.Decoder(bundle, load_engine(bundle, manifest, 1), tokenizer, planner, template=template)
    monkeypatch.setattr(decoder_module, "time", clock())
    results = []
    for text in requests:
        rounds: list[dict[str, Any]] = []

        def recorded(*arguments: Any, rounds: list[dict[str, Any]] = rounds) -> Any:
            for done in decoder_module.rounds(*arguments):
                rounds.append({"drafts": list(done.drafts), "accepted": done.accepted, "tokens": done.tokens})
                yield done

        monkeypatch.setattr(streaming, "rounds", recorded)
        options = {key: text[key] for key in ("max_new_tokens", "num_draft_tokens", "temperature", "top_p", "top_k")}
        chats = isinstance(text["prompt"][:1], list) and isinstance(text["prompt"][0], dict)
        write = decoder.chat if chats else decoder.stream
        stream = write(text["prompt"], **options, seed=int(text["seed"]), stop=text["stop"])
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
                "decode_seconds": stats.decode_seconds,
                "drafted_by_position": stats.drafted_by_position,
                "accepted_by_position": stats.accepted_by_position,
                "sources": {source: counts.drafted for source, counts in stats.sources.items()},
            }
        )
    return results


def in_kotlin(bundle: Path, requests: list[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """Generate the texts with the app's core."""
    file = directory / "texts.json"
    file.write_text(json.dumps(requests))
    done = subprocess.run(["bash", BUILD / "host", bundle, file], capture_output=True, text=True, check=False)
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


@pytest.mark.parametrize("name", BUNDLES)
def test_kotlin_does_what_python_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = BUILD / f"bundle-{name}"
    requests = texts(bundle)
    kotlin = in_kotlin(bundle, requests, tmp_path)
    python = in_python(bundle, requests, monkeypatch)
    assert compare(requests, kotlin, python) == []
    # The texts cover accepted and rejected drafts of both sources, and all ways to end.
    assert 0 < sum(text["accepted"] for text in python) < sum(text["drafted"] for text in python)
    assert {source.split()[0] for text in python for source in text["sources"]} == {"drafter", "lookup"}
    reasons = {text["finish_reason"] for text in python}
    assert reasons >= {"length", "max_seq_len", "stop", "cancelled"}
    assert any(text["reused"] for text in python)


def test_kotlin_chats_as_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kotlin renders by the manifest's `chat`, Python by the template; a turn reuses the cache of the last one."""
    bundle = tmp_path / "bundle"
    shutil.copytree(BUILD / "bundle-onnx-int4", bundle)
    (bundle / CHAT_TEMPLATE).write_text(TEMPLATE)
    manifest = json.loads((bundle / "manifest.json").read_text())
    form = chat_format(bundle, SpecialTokens(manifest["tokens"]["bos"], tuple(manifest["tokens"]["eos"]), 0))
    assert form is not None
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"chat": asdict(form)}))
    system = {"role": "system", "content": "Answer in prose."}
    talk = [
        {"role": "user", "content": "  What is a future? \n"},
        {"role": "assistant", "content": "a result\n that is not there yet  "},
        {"role": "user", "content": "And a task, naïve one?"},
    ]
    chats = [talk[:1], talk, [system, *talk[:1]], [system, *talk]]
    options = DEFAULTS | {"stop": [], "num_draft_tokens": None, "max_new_tokens": 30}
    requests = [options | {"prompt": chat} for chat in chats]
    python = in_python(bundle, requests, monkeypatch)
    assert compare(requests, in_kotlin(bundle, requests, tmp_path), python) == []
    assert python[1]["reused"] > 10


@pytest.mark.parametrize("name", BUNDLES)
def test_kotlin_generates_the_same_whatever_is_drafted(name: str, tmp_path: Path) -> None:
    bundle = BUILD / f"bundle-{name}"
    requests = texts(bundle)
    by_text: dict[str, set[tuple[int, ...]]] = {}
    for text, result in zip(requests, in_kotlin(bundle, requests, tmp_path), strict=True):
        if "cancel_after" not in text and not text["stop"]:
            same = {key: value for key, value in text.items() if key != "num_draft_tokens"}
            by_text.setdefault(json.dumps(same), set()).add(tuple(result["tokens"]))
    assert sum(len(different) == 1 for different in by_text.values()) == len(by_text) >= 12
