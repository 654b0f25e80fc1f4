"""Names that training tools give to tensors, and checkpoints that are no plain weights of a model."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json
from runtime_ref.pointers import is_present

# Methods of quantized targets whose integers are exported as they are, see `exporter.checkpoint.packed`.
READABLE_METHODS = ("gemma", "compressed-tensors")

ADAPTER_CONFIG = "adapter_config.json"

# What training tools put into the names of tensors for modules that they wrap, at any place.
WRAPPERS = (
    "_orig_mod.",  # torch.compile
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",  # torch's activation checkpointing
    "_forward_module.",  # Lightning Fabric
)
# And before the names of all tensors: PEFT, DistributedDataParallel and DeepSpeed, distillation.
OUTER_WRAPPERS = ("base_model.model.", "module.", "student.")

# Ends of the names of tensors, and the method that writes them.
TENSORS_OF_METHODS: Mapping[str, str] = {
    r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b.*|\.base_layer\.weight": "adapter",
    r"\.(modules_to_save|original_module)\..*": "adapter",
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|quant_state\..*)": "bitsandbytes",
    r"\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r"_packed|\.weight_shape|\.weight_zero_point": "compressed-tensors",
    r"\.(weight_scale_inv|weight_scale|input_scale|activation_scale|input_activation_scale)": "a quantizing tool",
    r"_(blocks|scales)": "MXFP4",
}


def quantization(directory: Path) -> tuple[str, Mapping[str, Any]] | None:
    """Return the method that config.json names and its settings; None for a checkpoint that is not quantized."""
    config = read_json(directory / "config.json", "a Hugging Face checkpoint directory with this file")
    text = config.get("text_config") if isinstance(config, dict) else None
    for section in (config, text):
        settings = section.get("quantization_config") if isinstance(section, dict) else None
        if settings:
            return (str(settings.get("quant_method")), settings) if isinstance(settings, dict) else (str(settings), {})
    return None


def refuse_other_forms(directory: Path, readable: Collection[str] = ()) -> None:
    """Refuse a directory that holds an adapter, a GGUF file or a quantized checkpoint.

    Args:
        directory: the checkpoint's directory.
        readable: methods of quantized checkpoints that are not refused.

    Raises:
        InputError: it does; the message says what it is and what to do.
    """
    if is_present(directory / ADAPTER_CONFIG):
        config = read_json(directory / ADAPTER_CONFIG, "the config of an adapter")
        config = config if isinstance(config, dict) else {}
        kind, base = config.get("peft_type") or "PEFT", config.get("base_model_name_or_path") or "its base model"
        raise InputError(
            f"{directory}: holds an adapter ({kind}) for {base}, not a whole model; pass the base as --target, and"
            " this directory as --adapter"
        )
    path = directory / "config.json"
    if not is_present(path):
        if gguf := sorted(directory.glob("*.gguf")):
            raise InputError(f"{gguf[0]}: a GGUF file; pass the directory of the checkpoint it was converted from")
        return
    found = quantization(directory)
    if found is not None and found[0] not in readable:
        raise _quantized(path, found[0])


def refuse_other_tensors(directory: Path, names: Collection[str]) -> None:
    """Refuse tensors that an adapter or a quantizing tool named.

    Args:
        directory: the checkpoint's directory.
        names: names of its tensors.

    Raises:
        InputError: there are such names; the message says what they are and what to do.
    """
    for pattern, method in TENSORS_OF_METHODS.items():
        decoders = (name for name in sorted(names) if not is_of_towers(name))
        found = next((name for name in decoders if re.search(rf"(?:{pattern})$", name)), None)
        if found is None:
            continue
        if method == "adapter":
            raise InputError(
                f"{directory}: tensor {found} is an adapter's that was not merged; merge it (PEFT: merge_and_unload(),"
                " then save_pretrained()), and pass the merged checkpoint"
            )
        raise _quantized(directory, f"{method} (tensor {found})")


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Return the names of tensors without what `WRAPPERS` and `OUTER_WRAPPERS` put into them, by their own names."""
    pattern = "|".join(re.escape(wrapper) for wrapper in WRAPPERS)
    plain = {name: re.sub(rf"(?:(?<=\.)|^)(?:{pattern})", "", name) for name in names}
    while outer := next((w for w in OUTER_WRAPPERS if plain and all(n.startswith(w) for n in plain.values())), None):
        plain = {name: short.removeprefix(outer) for name, short in plain.items()}
    return plain


def is_of_towers(name: str) -> bool:
    """Return whether a tensor belongs to the parts for images or sound."""
    return re.search(r"(vision_tower|audio_tower|embed_vision|embed_audio)\.", name) is not None


def _quantized(path: Path, method: str) -> InputError:
    return InputError(
        f"{path}: the checkpoint is quantized, by {method}; pass its unquantized sister, or dequantize it"
        " (transformers: model.dequantize(), then save_pretrained()), and choose bits with --recipe"
    )
