"""Texts from a bundle, token by token: what an application calls."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_ref.acceptance import common_prefix
from runtime_ref.chat import CHAT_TEMPLATE, NO_TEMPLATE, ChatTemplate, Message
from runtime_ref.costs import load_costs, save_costs
from runtime_ref.decoder import Options, check_options, check_prompt, rounds
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import Engine, open_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TOKENIZER, TextTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """A new token, the text that it completes, and its log-probability (see `sampling.log_probabilities`).

    The text may be empty: where a token ends inside a character, or a stop string may be about to begin.
    """

    id: int
    text: str
    logprob: float


class Decoder:
    """A bundle, ready to write. It writes one text at a time, and what a text shares with the last is not run again."""

    def __init__(
        self,
        bundle: Path,
        engine: Engine,
        tokenizer: TextTokenizer | None,
        length: DraftLength,
        keep: Callable[[], None] = lambda: None,
        template: ChatTemplate | None = None,
    ) -> None:
        """`keep` is called after each text, and may raise OSError: it keeps what was measured."""
        self.bundle, self.engine, self.tokenizer, self.length = bundle, engine, tokenizer, length
        self.template = template
        self._keep = keep
        self.current: Stream | None = None
        self.written: Stream | None = None  # the one whose keys and values are in the engine's cache

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
    ) -> "Stream":
        """Continue a prompt. The same seed gives the same tokens, whatever is drafted.

        Args:
            prompt: text, or token ids.
            num_draft_tokens: drafts a round, 0 for plain decoding; None for as many as pay.
            temperature, top_p, top_k: None for what the checkpoint recommends.
            stop: strings that end the text; they are not part of it.

        Raises:
            InputError: for a prompt that cannot be run, or impossible options.
        """
        usual = self.engine.manifest.sampling
        sampling = Sampling(
            usual.temperature if temperature is None else temperature,
            usual.top_p if top_p is None else top_p,
            seed,
            usual.top_k if top_k is None else top_k,
        )
        options = Options(max_new_tokens, num_draft_tokens, sampling)
        if self.tokenizer is None and (isinstance(prompt, str) or stop):
            raise InputError(
                f"{self.bundle}: has no {TOKENIZER}; pass --prompt-ids and no stop strings, or export a checkpoint that"
                " has one"
            )
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            prompt = self.tokenizer.encode(prompt)
        if not all(stop):
            raise InputError("a stop string is empty: expected some text")
        check_prompt(self.engine.manifest, prompt)
        check_options(self.engine.manifest, options)
        self.current = Stream(self, list(prompt), options, tuple(stop))
        return self.current

    def chat(self, messages: Sequence[Message], **options: Any) -> "Stream":
        """Answer the last of the messages; the options are those of `stream`.

        Raises:
            InputError: as `stream`; the bundle has no chat template, or it refuses the messages.
        """
        if self.template is None:
            raise InputError(f"{self.bundle}: {NO_TEMPLATE}")
        return self.stream(self.template.render(messages), **options)

    def forget(self) -> None:
        """Run the next prompt as a whole."""
        self.written = None

    def keep_costs(self) -> None:
        """Keep what was measured for the next time; that it cannot be kept is said once."""
        try:
            self._keep()
        except OSError as error:
            log.warning("costs are not kept: %s: %s", error.filename, error.strerror)
            self._keep = lambda: None

    def reusable(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens are in the cache still; the last one is always run."""
        if self.written is None:
            return 0
        cached = [*self.written.prompt, *self.written.tokens][: self.engine.position]
        shared = common_prefix(cached, prompt[:-1])
        return shared if self.engine.keeps(shared) else 0


class Stream:
    """An iterator over the new tokens of one text, which may be left or cancelled at any time."""

    def __init__(self, decoder: Decoder, prompt: list[int], options: Options, stop: tuple[str, ...]) -> None:
        self.prompt, self.options, self.stats = prompt, options, Stats()
        self.tokens: list[int] = []
        self.text = ""
        self._decoder, self._stop, self._cancelled = decoder, stop, False
        self._tokens = self._run()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Token:
        if self._decoder.current is not self:
            raise RuntimeError("another text was started with this decoder; it writes one at a time")
        return next(self._tokens)

    def cancel(self) -> None:
        """End the text with the next token; may be called from another thread or a signal handler."""
        self._cancelled = True

    def _run(self) -> Iterator[Token]:
        decoder, stats = self._decoder, self.stats
        engine, start = decoder.engine, decoder.reusable(self.prompt)
        decoder.written = None  # until the prefill is done
        texts = decoder.tokenizer.stream(self._stop) if decoder.tokenizer else None
        for done in rounds(engine, self.prompt, self.options, stats, decoder.length, start):
            decoder.written = self
            for i, (token, logprob) in enumerate(zip(done.tokens, done.logprobs, strict=True), start=1):
                cancelled = self._cancelled
                last = cancelled or (bool(stats.finish_reason) and i == len(done.tokens))
                text = texts.add(token, last) if texts else ""
                if texts and texts.stopped:
                    stats.finish_reason = "stop"
                elif cancelled:
                    stats.finish_reason = "cancelled"
                if last or (texts and texts.stopped):
                    decoder.keep_costs()
                    yield self._new(Token(token, text, logprob))
                    return
                yield self._new(Token(token, text, logprob))

    def _new(self, token: Token) -> Token:
        self.tokens.append(token.id)
        self.text += token.text
        return token


def open_decoder(bundle: Path, threads: int | None = None, progress: Progress = lambda *_: None) -> Decoder:
    """Load a bundle after checking every file against the manifest.

    What passes cost is measured while it writes, and kept beside the bundle for the next time.

    Args:
        threads: threads inside an operation; None lets the backend choose.
        progress: told of the files as they are checked.

    Raises:
        InputError: as `engine.open_engine`; or tokenizer, chat template or the costs that were kept cannot be read.
    """
    engine = open_engine(bundle, threads, progress)
    tokenizer = TextTokenizer(bundle, engine.manifest) if (bundle / TOKENIZER).exists() else None
    template = ChatTemplate(bundle, tokenizer) if tokenizer and (bundle / CHAT_TEMPLATE).exists() else None
    costs = load_costs(bundle, engine.manifest, threads)
    length = DraftLength(engine.manifest.max_draft_tokens, costs)
    return Decoder(bundle, engine, tokenizer, length, lambda: save_costs(costs, bundle, threads), template)
