"""The exporter's model definition against transformers: logits, states, K/V and draft steps, in float32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.checkpoint.pair import open_pair
from exporter.modeling.target import empty_kv
from tests.pairs import SHAPES, load_reference, to_published

TOLERANCE = 1e-4  # sums of float32 in another order; the first layers agree within 1e-6
PROMPT, VERIFY = 30, 9  # tokens, together more than the sliding window of every shape


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("published", [False, True], ids=["text-only", "published"])
def test_target_equals_reference(
    name: str, published: bool, pair_dirs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    target_dir, drafter_dir = pair_dirs(name)
    if published:
        target_dir = to_published(target_dir, tmp_path / "published")
    reference, _ = load_reference(target_dir, drafter_dir)
    pair = open_pair(target_dir, drafter_dir)
    target = pair.load_target()
    tokens = _tokens(SHAPES[name].vocab, PROMPT + VERIFY)
    expected = reference(tokens[None], return_shared_kv_states=True, output_hidden_states=True)

    # A prefill that returns its last row alone, then a verify pass over the rest.
    prefill = target(tokens[:PROMPT], torch.tensor([0]), torch.tensor([PROMPT - 1]), empty_kv(pair.target, 64))
    verify = target(tokens[PROMPT:], torch.tensor([PROMPT]), torch.arange(VERIFY), prefill.kv)

    errors = {
        "prefill logits": _error(prefill.logits[0], expected.logits[0, PROMPT - 1]),
        "verify logits": _error(verify.logits, expected.logits[0, PROMPT:]),
        "verify state": _error(verify.state, expected.hidden_states[-1][0, PROMPT:]),
    }
    for layer_type, (key, value) in expected.shared_kv_states.items():
        source = pair.target.kv_source(layer_type)
        errors[f"{layer_type} key"] = _error(verify.kv[2 * source][:, : len(tokens)], key[0])
        errors[f"{layer_type} value"] = _error(verify.kv[2 * source + 1][:, : len(tokens)], value[0])
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize("name", SHAPES)
def test_rejected_rows_leave_no_trace(name: str, pair_dirs: Callable[[str], tuple[Path, Path]]) -> None:
    """After a rollback the target computes as if it had never run the rejected tokens, also past the sliding window."""
    pair = open_pair(*pair_dirs(name))
    target = pair.load_target()
    tokens = _tokens(SHAPES[name].vocab, 40)
    clean = target(tokens, torch.tensor([0]), torch.tensor([39]), empty_kv(pair.target, 64))
    first = target(tokens[:30], torch.tensor([0]), torch.tensor([29]), empty_kv(pair.target, 64))
    rejected = target(torch.full((8,), 5), torch.tensor([30]), torch.arange(8), first.kv)
    again = target(tokens[30:], torch.tensor([30]), torch.tensor([9]), rejected.kv)
    assert _error(again.logits, clean.logits) <= TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 6, 39])
def test_draft_steps_equal_reference(name: str, rows: int, pair_dirs: Callable[[str], tuple[Path, Path]]) -> None:
    """The token and state of each draft step, with fewer cache rows than the sliding window, nearly as many and more.

    The cache has stale rows after the valid ones.
    """
    reference, assistant = load_reference(*pair_dirs(name))
    pair = open_pair(*pair_dirs(name))
    drafter = pair.load_drafter()
    tokens = _tokens(SHAPES[name].vocab, rows)
    out = reference(tokens[None], return_shared_kv_states=True, output_hidden_states=True)
    stale = torch.full((1, 20, 1), 7.0)
    kv = {
        layer_type: tuple(torch.cat((part[0], stale.expand(part.shape[1], 20, part.shape[3])), 1) for part in parts)
        for layer_type, parts in out.shared_kv_states.items()
    }
    token, state, position = torch.tensor([7]), out.hidden_states[-1][0, -1:], torch.tensor([rows])
    for _ in range(5):
        expected = assistant(
            inputs_embeds=torch.cat((reference.model.embed_tokens(token[None]), state[None]), -1),
            position_ids=position[None],
            shared_kv_states=out.shared_kv_states,
        )
        actual_token, actual_state = drafter(token, state, position, kv)
        token, state = expected.logits[0].argmax(-1), expected.last_hidden_state[0]
        assert actual_token.equal(token)
        assert _error(actual_state, state) <= TOLERANCE


def _tokens(vocab: int, count: int) -> torch.Tensor:
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(3))


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max())
