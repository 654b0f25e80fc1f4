"""Every form of checkpoint ends in what transformers computes, or in one line; docs/compatibility.md lists them."""

import dataclasses
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    Gemma4AssistantConfig,
    Gemma4Config,
    Gemma4TextConfig,
)
from transformers.models.gemma4 import modeling_gemma4

from exporter.checkpoint.config_json import config_notes
from exporter.checkpoint.other_forms import quantization
from exporter.checkpoint.pair import open_pair
from exporter.checkpoint.reference_keys import DRAFTER_KEYS, TARGET_KEYS, TEXT_KEYS, TEXT_KEYS_OF_CODE
from exporter.modeling.target import empty_kv
from runtime_ref.errors import InputError
from tests.conftest import Directories
from tests.exporter.checkpoint.forms import FORMS, Form, edit_json, page

ROOT = Path(__file__).parents[3]
ALL_FORMS = {f"{group}: {name}": form for group, forms in FORMS.items() for name, form in forms.items()}


@pytest.fixture
def copies(pair_dirs: Callable[[str], Directories], tmp_path: Path) -> Directories:
    for source, name in zip(pair_dirs("dense"), ("target", "drafter"), strict=True):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "target", tmp_path / "drafter"


@pytest.mark.parametrize("form", ALL_FORMS.values(), ids=ALL_FORMS)
def test_forms(form: Form, copies: Directories) -> None:
    form.change(*copies)
    if form.message:
        with pytest.raises(InputError, match=form.message) as refused:
            open_pair(*copies)
        assert "\n" not in str(refused.value) and ";" in str(refused.value)
        return
    pair, tokens = open_pair(*copies), torch.tensor([2, 77, 130, 9])
    logits = pair.load_target()(tokens, torch.tensor([0]), torch.arange(4), empty_kv(pair.target, 8)).logits
    if form.by_transformers:
        # Sizes of the published form's towers, which are no part of this, are made up.
        options: dict = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        if (found := quantization(copies[0])) is not None and found[0] == "compressed-tensors":
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(copies[0], **options)
        expected = model(tokens[None]).logits[0]
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_page_lists_the_forms() -> None:
    assert (ROOT / "docs/compatibility.md").read_text(encoding="utf-8") == page(), "run `make docs`"


@pytest.mark.parametrize(
    ("config", "keys"),
    [(Gemma4TextConfig, TEXT_KEYS), (Gemma4Config, TARGET_KEYS), (Gemma4AssistantConfig, DRAFTER_KEYS)],
)
def test_keys_are_those_of_the_reference(config: type, keys: frozenset[str]) -> None:
    assert keys == {field.name for field in dataclasses.fields(config)}


def test_keys_that_the_references_code_reads() -> None:
    """Beside its fields: `kwargs.pop` of the config's class, and attributes of text configs in the model's code."""
    source = inspect.getsource(Gemma4TextConfig) + inspect.getsource(modeling_gemma4)
    popped = set(re.findall(r'kwargs\.pop\("(\w+)"', source)) | set(re.findall(r'"(\w+)" not in kwargs', source))
    popped.discard("shared_kv_states")  # an argument of layers
    assert popped <= TEXT_KEYS | TEXT_KEYS_OF_CODE


def test_keys_that_nobody_reads_are_noted(copies: Directories) -> None:
    target, drafter = copies
    edit_json(target / "config.json", unsloth_fixed=True, auto_map=None)
    edit_json(drafter / "config.json", "text_config", color="blue")
    warnings = open_pair(target, drafter).warnings
    assert warnings == (
        f"{target / 'config.json'}: unsloth_fixed is not a key that transformers knows; it is ignored",
        f"{drafter / 'config.json'}: text_config.color is not a key that transformers knows; it is ignored",
    )
    assert not [*config_notes(target)][1:]
