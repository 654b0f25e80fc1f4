"""Print generated text while it is generated, and a line of statistics after it."""

import click

from exporter.terminal import err
from runtime_ref.stats import Stats
from runtime_ref.streaming import Decoder, Stream


def print_stream(stream: Stream, as_text: bool = True) -> None:
    """Print a stream's tokens while they are generated, then its statistics on standard error.

    Args:
        stream: a stream that was not iterated over before.
        as_text: whether to print text, instead of token ids.
    """
    for token in stream:
        click.echo(token.text if as_text else f"{token.id} ", nl=False)
    click.echo()
    err.print(stats_line(stream.stats, len(stream.tokens)), style="dim")


def print_continuation(decoder: Decoder, stream: Stream) -> None:
    """Print a prompt and its continuation as text, or only the ids of the new tokens if there is no tokenizer.

    Args:
        decoder: the decoder that made the stream.
        stream: a stream that was not iterated over before.
    """
    if decoder.tokenizer:
        click.secho(decoder.tokenizer.decode(stream.prompt), dim=True, nl=False)
    print_stream(stream, as_text=decoder.tokenizer is not None)


def stats_line(stats: Stats, new_tokens: int) -> str:
    """Summarise a generation in one line: tokens, rate, acceptance rate, tokens a round, reused prompt tokens.

    Args:
        stats: counts and times of the generation.
        new_tokens: number of generated tokens.
    """
    line = f"{new_tokens} tokens ({stats.finish_reason})"
    if stats.decode_seconds:
        line += f", {max(new_tokens - 1, 0) / stats.decode_seconds:.1f} tokens/s"
    if stats.acceptance_rate is not None:
        by_position = " ".join(f"{rate:.0%}" for rate in stats.acceptance_by_position)
        line += f", {stats.acceptance_rate:.0%} of drafts accepted ({by_position} by position)"
    if stats.mean_tokens_per_round is not None:
        line += f", {stats.mean_tokens_per_round:.2f} tokens a round"
    if stats.reused_tokens > 1:  # any two prompts share the beginning-of-text token
        line += f", {stats.reused_tokens} prompt tokens reused"
    return line
