"""Print generated text while it is generated, and a line of statistics after it."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator

import click

from exporter.terminal import err, progress_bar
from runtime_ref.stats import Stats
from runtime_ref.streaming import Decoder
from runtime_ref.text_parts import THOUGHT
from runtime_ref.token_stream import PrefillProgress, Stream


def print_stream(stream: Stream, as_text: bool = True, prompt: str = "") -> None:
    """Print a stream's tokens while they are generated, then its calls of tools, then its statistics.

    Thoughts and statistics go to standard error, so that standard output holds the answer alone. So does a progress bar
    while a prompt of several chunks is run, if standard error is a terminal.

    Args:
        stream: a stream that was not iterated over before.
        as_text: whether to print text, instead of token ids.
        prompt: printed before its first token.
    """
    with prompt_bar() as stream.progress:
        first = list(itertools.islice(stream, 1))
    stream.progress = lambda *_: None  # no bar in the middle of a text, where a full context is shifted
    if prompt:  # not before: the bar erases the line that it is shown in
        click.secho(prompt, dim=True, nl=False)
    thinking = False
    for token in itertools.chain(first, stream):
        if token.part == THOUGHT and as_text:
            click.secho(token.part_text, dim=True, nl=False, err=True)
            thinking = thinking or bool(token.part_text)
        elif thinking and token.text.strip():
            click.echo(err=True)
            thinking = False
        click.echo(token.text if as_text else f"{token.id} ", nl=False)
    click.echo(err=thinking)
    for call in stream.calls:
        if call.problem:
            err.print(f"a call of a tool cannot be read ({call.problem}): {call.text}")
        else:
            click.echo(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})")
    line = f"{stats_line(stream.stats, len(stream.tokens))}, {stream.tokens_left} tokens left"
    if stream.dropped_messages:
        line += f", the oldest {stream.dropped_messages} messages are no longer in the context"
    err.print(line, style="dim")


def print_continuation(decoder: Decoder, stream: Stream) -> None:
    """Print a prompt and its continuation as text, or only the ids of the new tokens if there is no tokenizer.

    Args:
        decoder: the decoder that made the stream.
        stream: a stream that was not iterated over before.
    """
    tokenizer = decoder.tokenizer
    print_stream(stream, tokenizer is not None, tokenizer.decode(stream.prompt) if tokenizer else "")


@contextlib.contextmanager
def prompt_bar() -> Iterator[PrefillProgress]:
    """Show a progress bar in the block, from the first chunk of a prompt that another follows.

    Yields:
        What to pass as `progress` of `Decoder.stream`.
    """
    advance: Callable[[str, int], None] | None = None
    before: int | None = None  # tokens that were in the cache at the last call
    with contextlib.ExitStack() as stack:

        def progress(done: int, total: int) -> None:
            nonlocal advance, before
            new = done - (before or 0)
            if advance is None and before is not None and done < total:
                advance, new = stack.enter_context(progress_bar(err, "reading the prompt", total)), done
            if advance is not None:
                advance(f"{done} of {total} tokens", new)
            before = done

        yield progress


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
