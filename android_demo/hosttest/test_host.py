"""Kotlin on bundles of both backends gives the tokens, rounds, accepted drafts, text and statistics of runtime_ref.

Run by `make android-test`, which builds the app's core and the bundles.
"""

import copy
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from runs import BUILD, DEFAULTS, compare, in_kotlin, in_python

from exporter.bundle.plain_chat import plain_chat
from exporter.checkpoint.special_tokens import SpecialTokens
from runtime_ref.chat import CHAT_TEMPLATE
from runtime_ref.manifest import read_manifest
from runtime_ref.streaming import open_decoder
from runtime_ref.tokenizer import TextTokenizer
from tests.handmade import listed_files

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


def rules(ids: list[int], vocab_size: int) -> list[dict[str, Any]]:
    """Return each rule, and all of them together; `ids` are likely tokens. Some bring up tokens beyond the 64."""
    likely = sorted(set(ids))
    biases = {str(likely[0]): 6.5, str(likely[1]): -3.25, str(vocab_size - 7): 12.0}
    return [
        {"suppress": likely[::2]},
        {"suppress": sorted(set(range(vocab_size)) - set(likely[:9]))},
        {"logit_bias": biases},
        {"logit_bias": {str(token): -40.0 for token in range(vocab_size // 2)}},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"presence_penalty": -0.75},
        {"frequency_penalty": 0.5},
        {"frequency_penalty": -0.25},
        {
            **{"suppress": likely[::3], "logit_bias": biases},
            **{"repetition_penalty": 1.1, "presence_penalty": 0.25, "frequency_penalty": 0.125},
        },
    ]


def texts(bundle: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return prompts and options: all numbers of drafts, greedy and sampled, short and past the sliding window.

    The second list has those under each rule.
    """
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
    # To a full context, and beyond it twice.
    ends += [
        {"prompt": ids[: manifest.max_seq_len - 9], "num_draft_tokens": drafts, "when_full": "shift", **options}
        for drafts in (0, 4, None)
        for options in (
            {"max_new_tokens": 25},
            {"max_new_tokens": manifest.max_seq_len, "temperature": 1.5, "seed": "4", "frequency_penalty": 0.5},
        )
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
    ruled = [
        {"prompt": ids[:30], "num_draft_tokens": drafts, **rule, **sampling}
        for rule in rules(ids, manifest.vocab_size)
        for sampling in ({}, {"temperature": 1.0, "seed": "8"})
        for drafts in (0, 4, None)
    ]
    unruled = [*greedy, *sampled, *ends, *budgets, *written, *conversation]
    return [DEFAULTS | run for run in unruled], [DEFAULTS | run for run in ruled]


def differing(requests: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[str]:
    """Return the texts that differ between numbers of drafts."""
    by_text: dict[str, set[tuple[int, ...]]] = {}
    for text, result in zip(requests, results, strict=True):
        if "cancel_after" not in text and not text["stop"]:
            same = {key: value for key, value in text.items() if key != "num_draft_tokens"}
            by_text.setdefault(json.dumps(same), set()).add(tuple(result["tokens"]))
    assert len(by_text) >= 12
    return [text for text, different in by_text.items() if len(different) > 1]


@pytest.mark.parametrize("name", BUNDLES)
def test_kotlin_does_what_python_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = BUILD / f"bundle-{name}"
    unruled, ruled = texts(bundle)
    requests = unruled + ruled
    python = in_python(bundle, requests, monkeypatch)
    kotlin = in_kotlin(bundle, requests, tmp_path)
    assert differing(requests, kotlin) == []
    assert compare(requests, kotlin, copy.deepcopy(python)) == []
    # Opened and saved around each text; rules do not look at the cache.
    kotlin = in_kotlin(bundle, unruled, tmp_path, tmp_path / "session")
    assert compare(unruled, kotlin, copy.deepcopy(python[: len(unruled)])) == []
    # The texts cover accepted and rejected drafts of both sources, and all ways to end.
    assert 0 < sum(text["accepted"] for text in python) < sum(text["drafted"] for text in python)
    assert {source.split()[0] for text in python for source in text["sources"]} == {"drafter", "lookup"}
    reasons = {text["finish_reason"] for text in python}
    assert reasons >= {"length", "max_seq_len", "stop", "cancelled"}
    assert any(text["reused"] for text in python)


@pytest.mark.parametrize("name", BUNDLES)
def test_sessions_go_from_one_language_to_the_other(name: str, tmp_path: Path) -> None:
    bundle, file = BUILD / f"bundle-{name}", tmp_path / "session"
    options: dict[str, Any] = {"max_new_tokens": 20, "num_draft_tokens": 4, "temperature": 0.0}
    with open_decoder(bundle, threads=1) as decoder:
        conversation = decoder.conversation()
        prompt = TEXT + "".join(token.text for token in conversation.stream(TEXT, **options))
        for _ in range(2):
            conversation.save(file)
            expected = conversation.stream(prompt, **options)
            answer = "".join(token.text for token in expected)
            (kotlin,) = in_kotlin(bundle, [DEFAULTS | options | {"prompt": prompt}], tmp_path, file)
            assert kotlin["tokens"] == expected.tokens
            assert kotlin["reused"] == expected.stats.reused_tokens > 30
            conversation = decoder.open_session(file)  # as Kotlin saved it
            prompt += answer


@pytest.mark.parametrize("sample", ["java-sample", "kotlin-sample"])
def test_samples_do_what_an_app_does(sample: str, tmp_path: Path) -> None:
    """They write a text, and a session that the next run goes on from; what cannot be used is one line."""
    bundle = tmp_path / "bundle"
    shutil.copytree(BUILD / "bundle-onnx-int4", bundle)
    device, session = tmp_path / "device", tmp_path / "session"
    with open_decoder(bundle, threads=1) as decoder:
        text, whole = "", TEXT
        for _ in range(2):
            command = ["bash", BUILD / sample, bundle, device, whole, session]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            text = "".join(token.text for token in decoder.stream(whole, max_new_tokens=40))
            assert done.stdout == text
            whole += text
        assert decoder.open_session(session).position > 40
    assert (device / "costs.json").is_file()
    session.write_bytes(b"no session")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_kotlin_chats_as_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kotlin renders by the manifest's `chat`, Python by the template; a turn reuses the cache of the last one."""
    bundle = tmp_path / "bundle"
    shutil.copytree(BUILD / "bundle-onnx-int4", bundle)
    (bundle / CHAT_TEMPLATE).write_text(TEMPLATE)
    manifest = json.loads((bundle / "manifest.json").read_text())
    tokens = SpecialTokens(manifest["tokens"]["bos"], tuple(manifest["tokens"]["eos"]), 0)
    form = plain_chat(bundle, tokens).chat
    assert form is not None
    changed = manifest | {"chat": asdict(form), "files": listed_files(bundle)}
    (bundle / "manifest.json").write_text(json.dumps(changed))
    system = {"role": "system", "content": "Answer in prose."}
    talk = [
        {"role": "user", "content": "  What is a future? \n"},
        {"role": "assistant", "content": "a result\n that is not there yet  "},
        {"role": "user", "content": "And a task, naïve one?"},
    ]
    chats = [talk[:1], talk, [system, *talk[:1]], [system, *talk]]
    options = DEFAULTS | {"num_draft_tokens": None, "max_new_tokens": 30}
    requests = [options | {"prompt": chat} for chat in chats]
    # Longer than the context from some turn on: what was left out stays so, and the cache is used.
    long = [message | {"content": message["content"] + TEXT} for message in talk[:2]]
    context = manifest["max_seq_len"]
    for turns in range(3, 3 + context // 30):
        requests.append(options | {"prompt": [system, *(long * turns)[:-1]], "when_full": "shift"})
    python = in_python(bundle, requests, monkeypatch)
    assert compare(requests, in_kotlin(bundle, requests, tmp_path), python) == []
    assert python[1]["reused"] > 10
    dropped = [text["dropped_messages"] for text in python]
    assert dropped[-1] > max(dropped[4:6])
    assert sum(text["reused"] > 100 for text in python[-10:]) > 5
