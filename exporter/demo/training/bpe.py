"""Train and use the tokenizer of the built-in pair."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

VOCAB = 2048
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-fallback BPE tokenizer like Gemma's: spaces become U+2581, unknown characters become bytes.

    Args:
        texts: training texts.

    Returns:
        A tokenizer with `VOCAB` tokens, which puts <bos> before each text.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    ascii_only = [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=ascii_only, limit_alphabet=120, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Byte tokens must be ordinary tokens: as special ones they would be cut out of the decoded text.
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer.json of a target's directory."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def pack(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return the token ids of all texts in one sequence, [T] int64; each text begins with <bos> and ends with <eos>."""
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in (*encoding.ids, SPECIAL.index("<eos>"))]
    return torch.tensor(ids)
