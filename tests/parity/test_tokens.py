"""Exported bundles against transformers: the same greedy tokens, and no more passes of the target."""

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from runtime_ref.decoder import Options, generate
from runtime_ref.engine import open_engine
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer
from tests.exports import SMALL_BUNDLES
from tests.pairs import SHAPES, load_reference, reference_greedy


@pytest.mark.parametrize(("name", "backend"), SMALL_BUNDLES)
def test_tokens_equal_reference(
    name: str, backend: str, bundle: Callable[..., Path], pair_dirs: Callable[[str], tuple[Path, Path]]
) -> None:
    """Prompts of one token, of a few, longer than the sliding window and longer than a prefill chunk."""
    reference, _ = load_reference(*pair_dirs(name))
    engine = open_engine(bundle(name, backend), threads=1)
    for length in (1, 5, 40, 200):
        prompt = [(7 * i * i + 11 * i + 5) % SHAPES[name].vocab for i in range(length)]
        expected, _ = reference_greedy(reference, prompt, 24, [1])
        for drafts in (0, 4):
            actual = list(generate(engine, prompt, Options(24, drafts), Stats()))
            assert actual == expected, f"prompt of {length} tokens, {drafts} draft tokens"


def test_built_in_pair_equals_reference_in_no_more_passes(
    bundle: Callable[..., Path], pair_dirs: Callable[[str], tuple[Path, Path]]
) -> None:
    """The same tokens as assisted generation with K = 4, and no more passes over all prompts, with accepted drafts.

    For a single prompt either side may need a few passes more: after a rejection the reference drafts with a rejected
    row in view, the runtime does not. Past the sliding window the reference keeps all rejected rows in view, and the
    runtime needs fewer passes.
    """
    target_dir, drafter_dir = pair_dirs("demo")
    reference, assistant = load_reference(target_dir, drafter_dir)
    engine = open_engine(bundle("demo"), threads=1)
    tokenizer = TextTokenizer(bundle("demo"), engine.manifest)
    text = " ".join(topics["assert"].split()) + " " + " ".join(topics["del"].split())
    rounds = passes = accepted = 0
    for length in (1, 20, 90, 180):
        prompt = tokenizer.encode(text)[:length]
        expected, reference_passes = reference_greedy(reference, prompt, 60, sorted(engine.manifest.eos), assistant, 4)
        stats = Stats()
        assert list(generate(engine, prompt, Options(60, 4), stats)) == expected
        assert list(generate(engine, prompt, Options(60, 0), Stats())) == expected
        rounds, passes, accepted = rounds + stats.rounds, passes + reference_passes, accepted + stats.accepted
    assert accepted > passes / 2, "too few accepted drafts for the comparison of passes to mean anything"
    assert rounds <= passes + 1
