"""A conversation with an open bundle: what one of several keeps for itself."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtime_ref.arguments import callback, choice, flag, path, stop_strings, token_ids
from runtime_ref.cache import Cache
from runtime_ref.chat import NO_TEMPLATE, Message, Tool
from runtime_ref.decoder import check_prompt
from runtime_ref.errors import InputError
from runtime_ref.full_context import SHIFT, STOP, WHEN_FULL, ChatShift, TextShift
from runtime_ref.session_file import Session, save_session
from runtime_ref.stream_options import read_grammars, read_options, read_parts, read_rules, read_sampling
from runtime_ref.token_stream import PrefillProgress, Stream
from runtime_ref.tokenizer import TOKENIZER

if TYPE_CHECKING:
    from runtime_ref.streaming import Decoder


class Conversation:
    """Texts that continue each other: one at a time, over a KV cache of their own.

    What a prompt shares with the text before it is not run again. Streams of different conversations may be iterated
    over in turns, token by token, and in different threads; the engine runs one pass at a time.

    Attributes:
        decoder: the open bundle.
        cache: keys and values, and the tokens that they belong to.
        current: the newest stream; None before the first.
        messages: of a chat, for `save`, as an application sets them; an opened session's. Nothing else reads them.
    """

    def __init__(self, decoder: "Decoder", cache: Cache, messages: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Begin a conversation; applications call `Decoder.conversation`.

        Args:
            decoder: the open bundle.
            cache: of its manifest.
            messages: those of a chat so far.
        """
        self.decoder, self.cache, self.messages = decoder, cache, messages
        self.current: Stream | None = None
        self._reuse = True

    @property
    def position(self) -> int:
        """How many tokens are in the KV cache."""
        return self.cache.position

    @property
    def tokens_left(self) -> int:
        """How many tokens there is room for after those in the KV cache."""
        return self.cache.manifest.max_seq_len - self.cache.position

    @property
    def num_bytes(self) -> int:
        """Bytes of the KV cache's buffers."""
        return self.cache.num_bytes

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
        when_full: str = STOP,
        progress: PrefillProgress = lambda *_: None,
    ) -> Stream:
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
            when_full: what happens where prompt and answer fill the context: `stop` ends the text; `shift` leaves out
                its oldest tokens, all but the first, and runs the newest again, up to half of the context.
            progress: called with how many tokens of the prompt are in the cache and how many it has, before the prompt
                is run and after each chunk of it; likewise where a full context is shifted.

        Returns:
            The new text's stream, which ends any other of this conversation.

        Raises:
            InputError: the prompt cannot be run, an option is of another kind or out of its range, a grammar cannot be
                used, or there is text to read or write and the bundle has no tokenizer.
            RuntimeError: the decoder was closed.
        """
        decoder = self.decoder
        decoder.turns.check_open()
        manifest = decoder.engine.manifest
        sampling = read_sampling(manifest, temperature, top_p, top_k, seed)
        penalties = repetition_penalty, presence_penalty, frequency_penalty
        rules = read_rules(manifest, suppress, logit_bias, *penalties)
        grammars = read_grammars(lambda: decoder.vocabulary, json_schema, regex)
        numbers = max_new_tokens, num_draft_tokens, thinking_budget
        options, stop = read_options(manifest, *numbers, sampling, rules, grammars), stop_strings(stop)
        if decoder.tokenizer is None and (isinstance(prompt, str) or stop):
            raise InputError(
                f"{decoder.bundle}: has no {TOKENIZER}; pass --prompt-ids and no stop strings, or export a checkpoint"
                " that has one"
            )
        if isinstance(prompt, str):
            assert decoder.tokenizer is not None
            prompt = decoder.tokenizer.encode(prompt)
        prompt = token_ids(prompt)
        check_prompt(manifest, prompt)
        callback("progress", progress)
        shifts = choice("when_full", when_full, WHEN_FULL) == SHIFT
        self.current = Stream(self, prompt, options, stop, progress)
        self.current.context = TextShift(prompt, manifest.max_seq_len) if shifts else None
        return self.current

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool | None = None,
        strict_tools: bool = False,
        **options: Any,
    ) -> Stream:
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
                `thinking` is true, and after calls, if there are tools; these need not match. With `when_full="shift"`,
                the oldest turns of a chat that does not fit are left out, also in the middle of an answer: the system
                prompt and the newest turns are run again, see `full_context.ChatShift`.

        Returns:
            The answer's stream.

        Raises:
            InputError: as `stream`; or the bundle has no chat template, or it refuses the messages, or has no place for
                tools or thinking.
            RuntimeError: the decoder was closed.
        """
        decoder = self.decoder
        decoder.turns.check_open()
        if decoder.template is None or decoder.tokenizer is None:
            raise InputError(f"{decoder.bundle}: {NO_TEMPLATE}")
        template, encode = decoder.template, decoder.tokenizer.encode
        prompt = template.prompt(messages, tools, flag("thinking", thinking))
        calls, opens = read_parts(decoder.engine.manifest, lambda: decoder.vocabulary, tools, thinking, strict_tools)
        if choice("when_full", options.get("when_full", STOP), WHEN_FULL) == SHIFT:
            shift = ChatShift(
                messages,
                lambda kept: encode(template.render(kept, tools=tools, thinking=thinking)),
                decoder.engine.manifest.max_seq_len,
            )
            stream = self.stream(shift.begin(self.cache.reusable), **options)
            stream.context = shift
        else:
            stream = self.stream(prompt, **options)
        # A stream runs nothing before its first token is asked for.
        stream.options = replace(stream.options, grammars={**stream.options.grammars, **calls}, opens=opens)
        return stream

    def forget(self) -> None:
        """Let the next prompt be run as a whole, whatever it shares with the last text."""
        self._reuse = False

    def save(self, file: str | os.PathLike[str]) -> None:
        """Save the conversation for `Decoder.open_session`, as a whole or not at all; passes wait meanwhile.

        Saved are the tokens in the KV cache, their keys and values, what the planner has learned, and `messages`. The
        newest token of an answer is not in the cache yet; the next prompt has it, and runs it.

        Args:
            file: the session file; an existing one is replaced.

        Raises:
            InputError: the file cannot be written, or the messages are not JSON.
            RuntimeError: the decoder was closed.
        """
        with self.decoder.turns.turn():
            save_session(path(file, "a file"), Session(self.cache, self.decoder.planner.as_dict(), self.messages))

    def begin(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's first tokens are in the cache already; called when the prompt is about to run.

        Args:
            prompt: token ids.
        """
        if not self._reuse:
            self.cache.roll_back(0)
        self._reuse = True
        return self.cache.reusable(prompt)

    def check(self, stream: Stream) -> None:
        """Refuse to go on with a stream that has ended.

        Args:
            stream: one of this conversation.

        Raises:
            RuntimeError: another text was started in this conversation, or the decoder was closed.
        """
        self.decoder.turns.check_open()
        if self.current is not stream:
            raise RuntimeError("another text was started in this conversation; it generates one at a time")

    @contextlib.contextmanager
    def turn(self, stream: Stream) -> Iterator[None]:
        """Let a stream run passes over this conversation's cache while the block runs, after turns of others.

        Args:
            stream: one of this conversation.

        Raises:
            RuntimeError: as `check`.
        """
        with self.decoder.turns.turn():
            self.check(stream)
            self.decoder.engine.cache = self.cache
            yield

    @contextlib.contextmanager
    def pause(self, stream: Stream) -> Iterator[None]:
        """Let other conversations have turns while the block runs, between two passes of a turn.

        Args:
            stream: one of this conversation, which has the turn.

        Raises:
            RuntimeError: as `check`.
        """
        with self.decoder.turns.pause():
            yield
        self.check(stream)
        self.decoder.engine.cache = self.cache
