"""The whole chain against transformers: an exported bundle's tokens are the reference's, in no more passes."""

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from runtime_ref.decoder import Options, generate
from runtime_ref.engine import open_engine
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer
from tests.pairs import SHAPES, load_reference, reference_greedy


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_equal_reference(
    name: str, backend: str, bundle: Callable[..., Path], pair_dirs: Callable[[str], tuple[Path, Path]]
) -> None:
    """Prompts of one token, a few, across the window and across a prefill chunk."""
    reference, _ = load_reference(*pair_dirs(name))
    engine = open_engine(bundle(name, backend), threads=1)
    for length in (1, 5, 40, 200):
        prompt = [(7 * i * i + 11 * i + 5) % SHAPES[name].vocab for i in range(length)]
        wanted, _ = reference_greedy(reference, prompt, 24, [1])
        for drafts in (0, 4):
            found = list(generate(engine, prompt, Options(24, drafts), Stats()))
            assert found == wanted, f"prompt of {length}, {drafts} drafts"


def test_built_in_pair_equals_reference_in_no_more_passes(
    backend: str, bundle: Callable[..., Path], pair_dirs: Callable[[str], tuple[Path, Path]]
) -> None:
    """On a pair that accepts drafts: same tokens as assisted generation at K = 4, in no more passes over all prompts.

    Prompt by prompt the passes differ by a few either way: after a rejection the reference drafts with a rejected row
    in view and we do not. Past the sliding window, where it keeps all of them in view, we need fewer.
    """
    target_dir, drafter_dir = pair_dirs("demo")
    reference, assistant = load_reference(target_dir, drafter_dir)
    engine = open_engine(bundle("demo", backend), threads=1)
    tokenizer = TextTokenizer(bundle("demo", backend), engine.manifest)
    text = " ".join(topics["assert"].split()) + " " + " ".join(topics["del"].split())
    rounds = passes = accepted = 0
    for length in (1, 6, 20, 90, 130, 180):
        prompt = tokenizer.encode(text)[:length]
        wanted, needed = reference_greedy(reference, prompt, 60, sorted(engine.manifest.eos), assistant, 4)
        stats = Stats()
        assert list(generate(engine, prompt, Options(60, 4), stats)) == wanted
        assert list(generate(engine, prompt, Options(60, 0), Stats())) == wanted
        rounds, passes, accepted = rounds + stats.rounds, passes + needed, accepted + stats.accepted
    assert accepted > passes / 2, "too little was accepted for the comparison of passes to say much"
    assert rounds <= passes + 1
