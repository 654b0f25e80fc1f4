"""Generate text from a bundle, token by token: the interface for applications."""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime_ref.arguments import flag, integer, path, text
from runtime_ref.cache import Cache
from runtime_ref.chat import CHAT_TEMPLATE, ChatTemplate, Message, open_template
from runtime_ref.conversation import Conversation
from runtime_ref.costs import load_costs, save_costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import Engine, open_engine
from runtime_ref.grammar import Vocabulary
from runtime_ref.manifest import Progress
from runtime_ref.session_file import malformed, open_session
from runtime_ref.token_stream import Stream
from runtime_ref.tokenizer import TOKENIZER, TextTokenizer
from runtime_ref.turns import DecoderClosedError, Turns

log = logging.getLogger(__name__)


class Decoder:
    """An open bundle, which generates texts, one at a time in each conversation.

    `stream`, `chat` and `forget` are those of its own conversation; `conversation` begins others, and `open_session`
    goes on with saved ones. `close`, or the end of a `with` block, frees the graphs.

    Attributes:
        bundle: directory of the bundle.
        engine: the loaded graphs, which run over the cache of the conversation that has its turn.
        tokenizer: the bundle's; None if it has none.
        planner: chooses the number of drafts of each round, in all conversations.
        template: the bundle's chat template; None if it has none.
        turns: who may run passes.
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
            engine: the loaded graphs, with the cache of the decoder's own conversation.
            tokenizer: the bundle's, None if it has none.
            planner: chooses the number of drafts of each round.
            save: called after each text to save measured costs; it may raise OSError.
            template: the bundle's chat template, None if it has none.
        """
        self.bundle, self.engine, self.tokenizer, self.planner = bundle, engine, tokenizer, planner
        self.template = template
        self._save = save
        self.turns = Turns(self._free)
        self._own = Conversation(self, engine.cache)

    @property
    def current(self) -> Stream | None:
        """The newest stream of the decoder's own conversation; None before the first."""
        return self._own.current

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Stream:
        """Continue a prompt in the decoder's own conversation, as `Conversation.stream`, which has the options."""
        return self._own.stream(prompt, **options)

    def chat(self, messages: Sequence[Message], **options: Any) -> Stream:
        """Answer a message in the decoder's own conversation, as `Conversation.chat`, which has the options."""
        return self._own.chat(messages, **options)

    def forget(self) -> None:
        """Let the next prompt of the decoder's own conversation be run as a whole, as `Conversation.forget`."""
        self._own.forget()

    def conversation(self) -> Conversation:
        """Begin another conversation, with an empty cache.

        Its memory is freed when nothing refers to it any more and another conversation has run.

        Raises:
            RuntimeError: the decoder was closed.
        """
        self.turns.check_open()
        return Conversation(self, Cache(self.engine.manifest))

    def open_session(self, file: str | os.PathLike[str]) -> Conversation:
        """Open a conversation that `Conversation.save` saved with this bundle; it goes on as if it had not been closed.

        Its keys and values are mapped into memory and read from the file as they are needed; the file stays as it is.
        What the planner had learned counts if this decoder's has learned nothing yet.

        Args:
            file: the session file. It may be replaced while the conversation goes on, but not changed in place.

        Raises:
            InputError: it is no session file, incomplete, malformed, of another version, or of another bundle.
            RuntimeError: the decoder was closed.
        """
        self.turns.check_open()
        opened = path(file, "a file")
        session = open_session(opened, self.engine.manifest)
        with self.turns.turn():
            try:
                read = DraftLength(self.engine.manifest.max_draft_tokens, self.planner.costs)
                read.restore(session.planner)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise malformed(opened, error) from error
            if self.planner.is_new:
                self.planner.restore(session.planner)
        return Conversation(self, session.cache, session.messages)

    def close(self) -> None:
        """Free the graphs, after the pass that is running; later calls do nothing.

        It may be called from any thread. Streams and new texts then raise RuntimeError.
        """
        self.turns.close()

    def __enter__(self) -> "Decoder":
        """Return the decoder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The bundle's tokens as grammars see them; making it takes seconds at full size."""
        return Vocabulary(self.bundle, self.engine.manifest)

    def save_costs(self) -> None:
        """Save measured costs for the next time; a failure is logged once, and not tried again."""
        try:
            with self.turns.turn():  # no other thread measures meanwhile
                self._save()
        except DecoderClosedError:
            pass  # the text was complete before
        except OSError as error:
            log.warning("costs are not saved: %s: %s", error.filename, error.strerror)
            self._save = lambda: None

    def _free(self) -> None:
        """Free the graphs, and the cache of the decoder's own conversation; others free theirs with themselves."""
        self.engine.close()
        self._own.cache = self.engine.cache


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
    bundle, threads = path(bundle, "a bundle's directory"), None if threads is None else integer("threads", threads)
    digest = None if digest is None else text("digest", digest)
    engine = open_engine(bundle, threads, progress, digest, bool(flag("verify", verify)))
    tokenizer = TextTokenizer(bundle, engine.manifest) if (bundle / TOKENIZER).exists() else None
    template = open_template(bundle, tokenizer) if tokenizer and (bundle / CHAT_TEMPLATE).exists() else None
    manifest = engine.manifest
    costs = load_costs(bundle, threads, manifest.max_draft_tokens, manifest.row_multiple)
    planner = DraftLength(manifest.max_draft_tokens, costs)
    return Decoder(bundle, engine, tokenizer, planner, lambda: save_costs(costs, bundle, threads), template)
