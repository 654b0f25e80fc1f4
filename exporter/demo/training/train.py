"""Train the built-in pair: `python -m exporter.demo.training.train --output DIR` (one to two hours on one core).

A small target in the shape of Gemma 4 E2B is trained on Python's documentation, then its drafter on the target's
output. Both run the model definition that is exported, mapped over a batch. The drafter is trained in two phases: on
the documents, then on text that the target generates, because it will draft such text. Checkpoints are written in the
published dialect, in bfloat16. Checkpoints that exist in DIR are used: a target is not trained again, and a drafter
skips its first phase.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.checkpoint.config_json import read_target_config
from exporter.demo.corpus import documents
from exporter.demo.sizes import drafter_json, target_json
from exporter.demo.training.bpe import VOCAB, pack, train_tokenizer
from exporter.demo.training.checkpoints import (
    load_drafter,
    load_target,
    new_drafter,
    print_acceptance,
    round_to_bfloat16,
    save_drafter,
    save_target,
)
from exporter.demo.training.learning import (
    BFLOAT16,
    DRAFTER_BATCH_SEQUENCES,
    SEQUENCE_TOKENS,
    TARGET_BATCH_SEQUENCES,
    batches,
    held_out_loss,
    initialise,
    optimise,
    run_target,
    shuffled,
    train_drafter,
    write_texts,
)
from exporter.modeling.config import LAYER_TYPES, AttentionConfig, DrafterConfig, TextConfig
from exporter.modeling.target import Target

SLIDING, FULL = LAYER_TYPES

TARGET = TextConfig(
    vocab_size=VOCAB,
    hidden_size=192,
    intermediate_size=352,
    num_hidden_layers=10,
    num_attention_heads=4,
    layer_types=((SLIDING,) * 4 + (FULL,)) * 2,
    sliding_attention=AttentionConfig(32, 1, 1e4),
    full_attention=AttentionConfig(64, 1, 1e6, "proportional", 0.25),
    sliding_window=64,
    rms_norm_eps=1e-6,
    num_kv_shared_layers=5,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=VOCAB,
    final_logit_softcapping=30.0,
    max_position_embeddings=1024,
)
DRAFTER = DrafterConfig(
    text=replace(
        TARGET,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        layer_types=(SLIDING,) * 3 + (FULL,),
        num_kv_shared_layers=4,
        use_double_wide_mlp=False,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=None,
    ),
    backbone_hidden_size=TARGET.hidden_size,
    num_centroids=64,
    centroid_intermediate_top_k=8,
)


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory to write the pair to.")
@click.option("--target-steps", default=1400, show_default=True, help="Training steps of the target.")
@click.option("--drafter-steps", default=650, show_default=True, help="Training steps of the drafter on the documents.")
@click.option(
    "--own-text-steps", default=650, show_default=True, help="Training steps of the drafter on the target's own text."
)
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(output: Path, target_steps: int, drafter_steps: int, own_text_steps: int, threads: int) -> None:
    """Train target, drafter and clusters, and print loss and acceptance rate on held-out text."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    training, held_out = documents()
    tokenizer = train_tokenizer(training)
    for name, config in (("target", target_json(TARGET)), ("drafter", drafter_json(DRAFTER))):
        (output / name).mkdir(parents=True, exist_ok=True)
        (output / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save(str(output / "target" / "tokenizer.json"))
    (output / "target" / "generation_config.json").write_text('{"bos_token_id": 2, "eos_token_id": [1]}\n')

    tokens, unseen = (pack(tokenizer, texts) for texts in (training, held_out))
    started = time.time()
    if (output / "target" / "model.safetensors").exists():
        target = load_target(output / "target", BFLOAT16)
    else:
        target = Target(read_target_config(output / "target"), BFLOAT16)
        train_target(target, tokens, target_steps)
        round_to_bfloat16(target)
        save_target(target, output / "target")
    print(f"target: {time.time() - started:.0f} s, held-out loss {held_out_loss(target, unseen):.3f} nats a token")

    started = time.time()
    drafter = new_drafter(output / "drafter", target, BFLOAT16)
    if (output / "drafter" / "model.safetensors").exists():
        load_drafter(drafter, output / "drafter")
    else:
        train_drafter(
            drafter, target, batches(tokens, DRAFTER_BATCH_SEQUENCES, SEQUENCE_TOKENS), drafter_steps, 3e-3, 1.0
        )
    train_drafter(drafter, target, shuffled(write_texts(target, tokens)), own_text_steps, 1.5e-3, 2.0)
    save_drafter(drafter, target, tokens, output / "drafter")
    print(f"drafter: {time.time() - started:.0f} s")
    print_acceptance(output, held_out)


def train_target(target: Target, tokens: Tensor, steps: int) -> None:
    """Train a target to predict the next token.

    Args:
        target: the target, which is initialised and trained in place.
        tokens: [T] int64, training text.
        steps: number of training steps.
    """
    initialise(target)

    def loss(batch: Tensor) -> Tensor:
        out = run_target(target, batch[:, :-1])
        return F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())

    optimise("target", target, loss, batches(tokens, TARGET_BATCH_SEQUENCES, SEQUENCE_TOKENS + 1), steps, 3e-3)


if __name__ == "__main__":
    main()
