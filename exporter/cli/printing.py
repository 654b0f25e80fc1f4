"""Print generated text as it arrives, and one line of statistics below it."""

import click

from exporter.terminal import err
from runtime_ref.stats import Stats
from runtime_ref.streaming import Decoder, Stream


def print_stream(stream: Stream, as_text: bool = True) -> None:
    """Print a stream's tokens as they arrive, then its statistics on standard error.

    Args:
        stream: a stream that was not iterated over yet.
        as_text: print text; without it, token ids.
    """
    for token in stream:
        click.echo(token.text if as_text else f"{token.id} ", nl=False)
    click.echo()
    err.print(stats_line(stream.stats, len(stream.tokens)), style="dim")


def print_continuation(decoder: Decoder, stream: Stream) -> None:
    """Print a prompt and its continuation, as text if the bundle has a tokenizer, else the new tokens as ids."""
    if decoder.tokenizer:
        click.secho(decoder.tokenizer.decode(stream.prompt), dim=True, nl=False)
    print_stream(stream, as_text=decoder.tokenizer is not None)


def stats_line(stats: Stats, new_tokens: int) -> str:
    """Summarise a generation in one line: tokens, rate, acceptance rate, tokens a round, reused prompt tokens."""
    line = f"{new_tokens} tokens ({stats.finish_reason})"
    if stats.decode_seconds:
        line += f", {max(new_tokens - 1, 0) / stats.decode_seconds:.1f} tokens/s"
    if stats.acceptance_rate is not None:
        by_position = " ".join(f"{rate:.0%}" for rate in stats.acceptance_by_position)
        line += f", {stats.acceptance_rate:.0%} of drafts accepted ({by_position} by position)"
    if stats.mean_tokens_per_round is not None:
        line += f", {stats.mean_tokens_per_round:.2f} tokens a round"
    if stats.reused_tokens > 1:  # every text shares its beginning-of-text token with the one before
        line += f", {stats.reused_tokens} prompt tokens reused"
    return line
