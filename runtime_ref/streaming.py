"""Generate text from a bundle, token by token: the interface for applications."""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime_ref.arguments import callback, directory, flag, integer, stop_strings, text, token_ids
from runtime_ref.chat import CHAT_TEMPLATE, NO_TEMPLATE, ChatTemplate, Message, Tool, open_template
from runtime_ref.costs import load_costs, save_costs
from runtime_ref.decoder import Options, check_prompt, rounds
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import Engine, open_engine
from runtime_ref.errors import InputError
from runtime_ref.grammar import Vocabulary
from runtime_ref.manifest import Progress
from runtime_ref.stats import Stats
from runtime_ref.stream_options import read_grammars, read_options, read_parts, read_rules, read_sampling
from runtime_ref.text_parts import ANSWER, THOUGHT, TOOL_CALL, PartTracker
from runtime_ref.text_stream import Channel, TextStream
from runtime_ref.tokenizer import TOKENIZER, TextTokenizer
from runtime_ref.tool_calls import ToolCall, read_call

log = logging.getLogger(__name__)

PrefillProgress = Callable[[int, int], None]  # called with tokens of a prompt that are in the cache, and all of them


@dataclass(frozen=True)
class Token:
    """A new token.

    Attributes:
        id: token id.
        text: the text of the answer that the token completes; empty in a thought or a call of a tool, and where it ends
            inside a character, or in what may become a stop string.
        logprob: natural logarithm of its probability, as `sampling.log_probabilities` defines it.
        part: what the token belongs to: `answer`, `thought`, `tool_call`, or another channel of the bundle.
        part_text: the text of that part that the token completes; the same as `text` in the answer.
    """

    id: int
    text: str
    logprob: float
    part: str = ANSWER
    part_text: str = ""


class Decoder:
    """An open bundle, which generates one text at a time. What a prompt shares with the last text is not run again.

    Attributes:
        bundle: directory of the bundle.
        engine: the loaded graphs and their cache.
        tokenizer: the bundle's; None if it has none.
        planner: chooses the number of drafts of each round.
        template: the bundle's chat template; None if it has none.
    """

    def __init__(
        self,
        bundle: Path,
        engine: Engine,
        tokenizer: TextTokenizer | None,
        planner: DraftLength,
        save: Callable[[], None] = lambda: None,
        template: ChatTemplate | None = None,
    ) -> None:
        """Put a decoder together; applications call `open_decoder`.

        Args:
            bundle: directory of the bundle, for messages.
            engine: the loaded graphs and their cache.
            tokenizer: the bundle's, None if it has none.
            planner: chooses the number of drafts of each round.
            save: called after each text to save measured costs; it may raise OSError.
            template: the bundle's chat template, None if it has none.
        """
        self.bundle, self.engine, self.tokenizer, self.planner = bundle, engine, tokenizer, planner
        self.template = template
        self._save = save
        self.current: Stream | None = None
        self._reuse = True

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        num_draft_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        suppress: Sequence[int] = (),
        logit_bias: Mapping[int, float] | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        thinking_budget: int | None = None,
        progress: PrefillProgress = lambda *_: None,
    ) -> "Stream":
        """Continue a prompt. The same seed gives the same tokens, whatever is drafted.

        Args:
            prompt: text, or token ids that begin with the beginning-of-text token, also as an array of numpy or torch.
            max_new_tokens: the largest number of tokens to generate, at least 1.
            num_draft_tokens: K of every round, 0 for plain decoding; None chooses the fastest K for each round.
            temperature: divides the logits, 0 is greedy; None for the checkpoint's recommendation.
            top_p: probability to keep, more than 0 and at most 1; None for the checkpoint's recommendation.
            top_k: how many of the largest logits to keep, 1 to 64; None for the checkpoint's recommendation.
            seed: of the noise, 0 to 2**64 - 1.
            stop: strings that end the text; they are not part of it.
            suppress: ids of tokens that are never chosen.
            logit_bias: by token id, what is added to its logit, -100 to 100.
            repetition_penalty: divides positive logits of tokens of the prompt and the answer, and multiplies others;
                0.01 to 100, 1 is none; None for the checkpoint's recommendation.
            presence_penalty: subtracted from logits of tokens of the answer, -2 to 2.
            frequency_penalty: subtracted for each time that a token is in the answer, -2 to 2.
            json_schema: JSON Schema that the answer fulfils, as a text or parsed. Needs the extra `grammar`.
            regex: regular expression that the whole answer matches. Needs the extra `grammar`.
            thinking_budget: the largest number of tokens of thoughts, after which a thought is ended; None for any.
            progress: called with how many tokens of the prompt are in the cache and how many it has, before the prompt
                is run and after each chunk of it.

        Returns:
            The new text's stream, which ends any other of this decoder.

        Raises:
            InputError: the prompt cannot be run, an option is of another kind or out of its range, a grammar cannot be
                used, or there is text to read or write and the bundle has no tokenizer.
        """
        manifest = self.engine.manifest
        sampling = read_sampling(manifest, temperature, top_p, top_k, seed)
        penalties = repetition_penalty, presence_penalty, frequency_penalty
        rules = read_rules(manifest, suppress, logit_bias, *penalties)
        grammars = read_grammars(lambda: self.vocabulary, json_schema, regex)
        numbers = max_new_tokens, num_draft_tokens, thinking_budget
        options, stop = read_options(manifest, *numbers, sampling, rules, grammars), stop_strings(stop)
        if self.tokenizer is None and (isinstance(prompt, str) or stop):
            raise InputError(
                f"{self.bundle}: has no {TOKENIZER}; pass --prompt-ids and no stop strings, or export a checkpoint that"
                " has one"
            )
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            prompt = self.tokenizer.encode(prompt)
        prompt = token_ids(prompt)
        check_prompt(manifest, prompt)
        callback("progress", progress)
        self.current = Stream(self, prompt, options, stop, progress)
        return self.current

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool | None = None,
        strict_tools: bool = False,
        **options: Any,
    ) -> "Stream":
        """Answer the last message of a conversation.

        Args:
            messages: oldest first, each with the keys `role` (system, user, assistant or tool) and `content`. An answer
                of this bundle is `Stream.message`; what a tool answered has the call's `tool_call_id` and `name`.
            tools: what the model may call, each an object of type `function` with its name, description and a JSON
                Schema of its parameters; None for none.
            thinking: whether the model thinks before it answers; None leaves it to the template.
            strict_tools: whether each call must be one of `tools`, with arguments that fulfil its JSON Schema. Needs
                the extra `grammar`.
            options: those of `stream`. With `json_schema` or `regex`, the answer may come after a thought, if
                `thinking` is true, and after calls, if there are tools; these need not match.

        Returns:
            The answer's stream.

        Raises:
            InputError: as `stream`; or the bundle has no chat template, or it refuses the messages, or has no place for
                tools or thinking.
        """
        if self.template is None:
            raise InputError(f"{self.bundle}: {NO_TEMPLATE}")
        prompt = self.template.prompt(messages, tools, flag("thinking", thinking))
        calls, opens = read_parts(self.engine.manifest, lambda: self.vocabulary, tools, thinking, strict_tools)
        stream = self.stream(prompt, **options)
        # A stream runs nothing before its first token is asked for.
        stream.options = replace(stream.options, grammars={**stream.options.grammars, **calls}, opens=opens)
        return stream

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The bundle's tokens as grammars see them; making it takes seconds at full size."""
        return Vocabulary(self.bundle, self.engine.manifest)

    def forget(self) -> None:
        """Let the next prompt be run as a whole, whatever it shares with the last text."""
        self._reuse = False

    def save_costs(self) -> None:
        """Save measured costs for the next time; a failure is logged once, and not tried again."""
        try:
            self._save()
        except OSError as error:
            log.warning("costs are not saved: %s: %s", error.filename, error.strerror)
            self._save = lambda: None

    def begin(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's first tokens are in the cache already; called when the prompt is about to run.

        Args:
            prompt: token ids.
        """
        reuse, self._reuse = self._reuse, True
        return self.engine.cache.reusable(prompt) if reuse else 0


class Stream:
    """An iterator over the new tokens of one text, which may be left or cancelled at any time.

    Attributes:
        prompt: token ids of the prompt.
        options: budget, drafting and sampling.
        stats: counts and times so far.
        tokens: ids of the new tokens so far.
        text: the answer's text so far.
        progress: called while the prompt is run, see `Decoder.stream`; may be set until the first token is asked for.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: list[int],
        options: Options,
        stop: tuple[str, ...],
        progress: PrefillProgress = lambda *_: None,
    ) -> None:
        """Begin a text; applications call `Decoder.stream` or `Decoder.chat`.

        Args:
            decoder: the open bundle.
            prompt: token ids, checked already.
            options: checked already.
            stop: strings that end the text.
            progress: called while the prompt is run.
        """
        self.prompt, self.options, self.stats, self.progress = prompt, options, Stats(), progress
        self.tokens: list[int] = []
        self.text = ""
        self._decoder, self._cancelled = decoder, False
        tracker = PartTracker(decoder.engine.manifest.channels, decoder.engine.manifest.eos, prompt)
        self._texts = decoder.tokenizer.stream(stop, prompt) if decoder.tokenizer else TextStream(_no_text, (), tracker)
        self._tokens = self._run()

    def __iter__(self) -> "Stream":
        """Return the stream itself."""
        return self

    def __next__(self) -> Token:
        """Return the next token.

        Raises:
            RuntimeError: another text was started with this decoder.
        """
        if self._decoder.current is not self:
            raise RuntimeError("another text was started with this decoder; it generates one at a time")
        return next(self._tokens)

    def cancel(self) -> None:
        """End the text with its next token; may be called from another thread or a signal handler.

        While the prompt is run, the text ends after the current chunk of it, without a token.
        """
        self._cancelled = True

    @property
    def thought(self) -> str:
        """What the model thought so far; thoughts that an answer comes between are on lines of their own."""
        return "\n".join(channel.text for channel in self._channels(THOUGHT) if channel.text)

    @property
    def calls(self) -> list[ToolCall]:
        """The calls of tools so far; one that is malformed, or that the text's end cut off, has a `problem`."""
        form = self._decoder.engine.manifest.parts.get(TOOL_CALL, {})
        return [
            read_call(channel.text, form, f"{len(self.prompt) + channel.start:09d}", channel.closed)
            for channel in self._channels(TOOL_CALL)
            if channel.closed or self.stats.finish_reason
        ]

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation, for the next turn.

        Calls that could not be read are left out, and blank content beside calls, which some templates would count.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thought:
            message["reasoning_content"] = self.thought
        if calls := [call.as_message() for call in self.calls if not call.problem]:
            message |= {"content": self.text if self.text.strip() else "", "tool_calls": calls}
        return message

    def _channels(self, name: str) -> list[Channel]:
        return [channel for channel in self._texts.channels if channel.name == name]

    def _run(self) -> Iterator[Token]:
        decoder, stats = self._decoder, self.stats
        start = decoder.begin(self.prompt)
        for done in rounds(
            decoder.engine, self.prompt, self.options, stats, decoder.planner, start, self._prefill_goes_on
        ):
            # The text has not ended before the last of these tokens is given out.
            reason, stats.finish_reason = stats.finish_reason, ""
            for i, (token, logprob) in enumerate(zip(done.tokens, done.logprobs, strict=True), start=1):
                stats.count(done.cut(i))
                ended = bool(reason) and i == len(done.tokens)
                cancelled = self._cancelled and not ended
                piece = self._texts.add(token, ended or cancelled)
                if stopped := self._texts.stopped:
                    stats.finish_reason = "stop"
                elif ended or cancelled:
                    stats.finish_reason = reason if ended else "cancelled"
                if ended or cancelled or stopped:
                    decoder.save_costs()
                self.tokens.append(token)
                self.text += piece.text
                yield Token(token, piece.text, logprob, piece.part, piece.part_text)
                if stats.finish_reason:
                    return

    def _prefill_goes_on(self, done: int) -> bool:
        self.progress(done, len(self.prompt))
        return not self._cancelled


def _no_text(tokens: Sequence[int], special: bool = False) -> str:
    """Stands for the tokenizer of a bundle that has none."""
    del tokens, special
    return ""


def open_decoder(
    bundle: str | os.PathLike[str],
    threads: int | None = None,
    progress: Progress = lambda *_: None,
    digest: str | None = None,
    verify: bool = False,
) -> Decoder:
    """Load a bundle after checking its files against the manifest.

    Times of passes are measured while it generates, and saved in a folder beside the bundle for the next time, with a
    record of the files that were checked: those that have not changed since are not read again.

    Args:
        bundle: directory written by `export`.
        threads: threads inside an operation; None lets the backend choose.
        progress: called with the name of a file and the number of its bytes that were checked since the last call.
        digest: hexadecimal sha256 of the manifest, as `export` printed it: another bundle is refused. None for any.
        verify: whether to read every file.

    Raises:
        InputError: as `engine.open_engine`; or the tokenizer or the chat template cannot be read.
    """
    bundle, threads = directory(bundle), None if threads is None else integer("threads", threads)
    digest = None if digest is None else text("digest", digest)
    engine = open_engine(bundle, threads, progress, digest, bool(flag("verify", verify)))
    tokenizer = TextTokenizer(bundle, engine.manifest) if (bundle / TOKENIZER).exists() else None
    template = open_template(bundle, tokenizer) if tokenizer and (bundle / CHAT_TEMPLATE).exists() else None
    manifest = engine.manifest
    costs = load_costs(bundle, threads, manifest.max_draft_tokens, manifest.row_multiple)
    planner = DraftLength(manifest.max_draft_tokens, costs)
    return Decoder(bundle, engine, tokenizer, planner, lambda: save_costs(costs, bundle, threads), template)
