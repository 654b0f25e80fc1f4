"""The new tokens of one text, as they come."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime_ref.acceptance import Round
from runtime_ref.decoder import Options, rounds
from runtime_ref.full_context import ChatShift, TextShift
from runtime_ref.stats import Stats
from runtime_ref.text_parts import ANSWER, THOUGHT, TOOL_CALL, PartTracker
from runtime_ref.text_stream import Channel, TextStream
from runtime_ref.tool_calls import ToolCall, read_call

if TYPE_CHECKING:
    from runtime_ref.conversation import Conversation

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


class Stream:
    """An iterator over the new tokens of one text, which may be left or cancelled at any time.

    Attributes:
        prompt: token ids of the prompt.
        options: budget, drafting and sampling.
        stats: counts and times so far.
        tokens: ids of the new tokens so far.
        text: the answer's text so far.
        progress: called while the prompt is run, see `Conversation.stream`; may be set until the first token is asked
            for.
        context: what stays of a full context; None to end the text where it is full.
    """

    def __init__(
        self,
        conversation: "Conversation",
        prompt: list[int],
        options: Options,
        stop: tuple[str, ...],
        progress: PrefillProgress = lambda *_: None,
    ) -> None:
        """Begin a text; applications call `stream` or `chat` of a conversation or a decoder.

        Args:
            conversation: what the text belongs to.
            prompt: token ids, checked already.
            options: checked already.
            stop: strings that end the text.
            progress: called while the prompt is run.
        """
        self.prompt, self.options, self.stats, self.progress = prompt, options, Stats(), progress
        self.context: TextShift | ChatShift | None = None
        self.tokens: list[int] = []
        self.text = ""
        self._conversation, self._cancelled, self._to_run = conversation, False, len(prompt)
        self._manifest, tokenizer = conversation.decoder.engine.manifest, conversation.decoder.tokenizer
        tracker = PartTracker(self._manifest.channels, self._manifest.eos, prompt)
        self._texts = tokenizer.stream(stop, prompt) if tokenizer else TextStream(_no_text, (), tracker)
        self._tokens = self._run()

    def __iter__(self) -> "Stream":
        """Return the stream itself."""
        return self

    def __next__(self) -> Token:
        """Return the next token.

        Raises:
            RuntimeError: another text was started in this conversation, or the decoder was closed.
        """
        self._conversation.check(self)
        return next(self._tokens)

    def cancel(self) -> None:
        """End the text with its next token; may be called from another thread or a signal handler.

        While the prompt is run, the text ends after the current chunk of it, without a token.
        """
        self._cancelled = True

    @property
    def tokens_left(self) -> int:
        """How many tokens there is room for after the newest one."""
        taken = len(self.prompt) + len(self.tokens) - self.stats.dropped_tokens
        return self._manifest.max_seq_len - taken

    @property
    def dropped_messages(self) -> int:
        """How many messages of a chat, after its system prompt, were left out because the context was full."""
        return self.context.dropped_messages if self.context else 0

    @property
    def thought(self) -> str:
        """What the model thought so far; thoughts that an answer comes between are on lines of their own."""
        return "\n".join(channel.text for channel in self._channels(THOUGHT) if channel.text)

    @property
    def calls(self) -> list[ToolCall]:
        """The calls of tools so far; one that is malformed, or that the text's end cut off, has a `problem`."""
        form = self._manifest.parts.get(TOOL_CALL, {})
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
        decoder, stats, passes = self._conversation.decoder, self.stats, self._passes()
        while True:
            # A round is one turn, so that the texts of other conversations get theirs between two.
            with self._conversation.turn(self):
                done = next(passes, None)
            if done is None:
                return
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

    def _passes(self) -> Iterator[Round]:
        """Yield the rounds; each is run in a turn of the conversation."""
        decoder, start = self._conversation.decoder, self._conversation.begin(self.prompt)
        given = decoder.engine, self.prompt, self.options, self.stats, decoder.planner, start
        yield from rounds(*given, self._prefill_goes_on, self._shift)

    def _prefill_goes_on(self, done: int) -> bool:
        with self._conversation.pause(self):
            self.progress(done, self._to_run)
        return not self._cancelled

    def _shift(self, answer: Sequence[int]) -> list[int] | None:
        stays = self.context.shift(answer) if self.context else None
        self._to_run = len(stays or ())
        return stays


def _no_text(tokens: Sequence[int], special: bool = False) -> str:
    """Stands for the tokenizer of a bundle that has none."""
    del tokens, special
    return ""
