"""Structured output: which tokens may come next in a text that must match a JSON Schema or a regular expression.

The library llguidance computes them; it is imported when a grammar is asked for (the extra `grammar`).
"""

import itertools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime_ref.errors import InputError
from runtime_ref.manifest import Manifest
from runtime_ref.text_parts import ANSWER, TOOL_CALL, PartTracker

if TYPE_CHECKING:
    from llguidance import LLMatcher

log = logging.getLogger(__name__)

# JSON texts are written as Python's json.dumps writes them: most of what lies between two values is forced then, and a
# model that wants to leave the schema cannot write blanks up to its budget. `x-guidance` in a schema says otherwise.
JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Vocabulary:
    """The tokens of a bundle as grammars see them: the bytes of each, and which end a text. Making it takes seconds.

    Attributes:
        size: V; ids beyond the tokenizer are allowed by no grammar.
        ends: ids of the tokens that end a text.
        special: ids of special tokens, by text.
        tokenizer: llguidance's.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        """Read the tokens of a bundle's tokenizer.json.

        Args:
            bundle: directory of the bundle.
            manifest: the bundle's.

        Raises:
            InputError: llguidance is not installed, the bundle has no tokenizer or one that cannot be read, or no token
                ends a text, so that an answer that is complete could not end.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise InputError(
                f"structured output needs llguidance, which cannot be imported ({error}); pip install"
                " 'gemma-mtp-export[grammar]'"
            ) from error
        from runtime_ref.tokenizer import TOKENIZER, read_tokenizer

        path = bundle / TOKENIZER
        if not path.exists():
            raise InputError(
                f"{bundle}: has no {TOKENIZER}, which structured output needs; export a checkpoint with one"
            )
        tokenizer = read_tokenizer(path, "export the bundle again")
        self.size, self.ends = manifest.vocab_size, frozenset(t for t in manifest.eos if t < manifest.vocab_size)
        added = tokenizer.get_added_tokens_decoder().items()
        self.special = {token.content: number for number, token in added if token.special}
        ends = sorted(token for token in self.ends if tokenizer.id_to_token(token) is not None)
        if not ends:
            raise InputError(f"{bundle}: has no token that ends a text, so no structured output could end")
        try:
            self.tokenizer: LLTokenizer = LLTokenizer(_without_plain_added(tokenizer.to_str()), eos_token=ends)
        except ValueError as error:
            raise InputError(f"{path}: cannot be used for structured output ({_line(error)})") from error


def _without_plain_added(source: str) -> str:
    """A tokenizer.json in which added tokens that are not special belong to the vocabulary.

    llguidance takes all that look like `<td>` for special ones, whose text no grammar matches.
    """
    document = json.loads(source)
    vocabulary, added = document["model"].get("vocab"), document.get("added_tokens") or []
    if isinstance(vocabulary, dict):
        for token in added:
            if not token["special"]:
                vocabulary.setdefault(token["content"], token["id"])
        document["added_tokens"] = [token for token in added if token["special"]]
    return json.dumps(document)


class Grammar:
    """What a text must match, compiled for a vocabulary; each text begins with `begin`."""

    def __init__(self, vocabulary: Vocabulary, source: str, what: str) -> None:
        """Compile a grammar; `json_grammar` and `regex_grammar` call this.

        Args:
            vocabulary: the bundle's.
            source: the grammar, in llguidance's form.
            what: names it in messages.

        Raises:
            InputError: the grammar is malformed, uses what llguidance does not know, or matches no text.
        """
        from llguidance import LLMatcher

        self._vocabulary, self._what = vocabulary, what
        self._matcher = LLMatcher(vocabulary.tokenizer, source, log_level=0)
        for warning in self._matcher.get_grammar_warnings():
            log.warning("%s: %s", what, _line(warning))
        probe = self._matcher.deep_copy()
        if not probe.is_error():
            probe.compute_bitmask()  # some errors are found when tokens are first asked for
        if probe.is_error():
            raise InputError(f"{what} cannot be used ({_line(probe.get_error())})")

    def begin(
        self, tracker: PartTracker, part: str = ANSWER, close: int | None = None, opens: Collection[int] = ()
    ) -> "GrammarText":
        """Begin a text.

        Args:
            tracker: of this grammar alone, before the text's first token.
            part: which part of the text must match; what other parts hold, such as a thought, is free.
            close: the token that ends that part; None if the text's end does.
            opens: tokens that may also come where the part is empty: they open a channel before it.
        """
        return GrammarText(self._matcher, self._vocabulary, self._what, tracker, part, close, opens)


class GrammarText:
    """A text on its way through a grammar, which binds one of its parts; each time that part begins anew."""

    def __init__(
        self,
        matcher: "LLMatcher",
        vocabulary: Vocabulary,
        what: str,
        tracker: PartTracker,
        part: str,
        close: int | None,
        opens: Collection[int],
    ) -> None:
        """Begin a text; `Grammar.begin` calls this.

        Args:
            matcher: at the beginning of the grammar.
            vocabulary: the bundle's.
            what: names the grammar in messages.
            tracker: as for `Grammar.begin`.
            part: as for `Grammar.begin`.
            close: as for `Grammar.begin`.
            opens: as for `Grammar.begin`.
        """
        self._start, self._matcher, self._ends, self._what = matcher, matcher.deep_copy(), vocabulary.ends, what
        self._num_known, self._mask_bytes = vocabulary.tokenizer.vocab_size, -(-vocabulary.size // 8)
        self._tracker, self._part, self._close, self._opens = tracker, part, close, list(opens)
        self._last = vocabulary.ends if close is None else frozenset([close])  # what ends the part
        self._is_empty, self._ended, self._called = True, False, False

    @property
    def binds(self) -> bool:
        """Whether the next token must match the grammar."""
        return not self._ended and (self._tracker.channel or ANSWER) == self._part

    def mask(self) -> np.ndarray | None:
        """Return which tokens may come next; None if any may.

        What ends the part may come where the grammar may end, and nothing else where it must.

        Returns:
            [ceil(V / 8)] uint8, a bit for each token id, the lowest bit first.

        Raises:
            InputError: llguidance reached one of its limits, because the grammar is too complex.
        """
        if not self.binds:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: self._mask_bytes]
        self._check()
        bits = np.concatenate([bits, np.zeros(self._mask_bytes - len(bits), np.uint8)])
        # A mark may be a token whose text a grammar would match.
        for token in (*self._tracker.marks, *([] if self._close is None else self._ends)):
            bits[token >> 3] &= ~np.uint8(1 << (token & 7))
        closes = [self._close] if self._close is not None and self._matcher.is_accepting() else []
        for token in (*self._before_all(), *closes):
            bits[token >> 3] |= np.uint8(1 << (token & 7))
        return bits

    def _before_all(self) -> Collection[int]:
        """What may also come while the part is empty: marks of other parts, and the end after a call of a tool."""
        if not self._is_empty:
            return ()
        return (*self._opens, *self._ends) if self._called else self._opens

    def commit(self, token: int) -> None:
        """Go on by a token, which `mask` allowed.

        Args:
            token: id of the text's next token.
        """
        if token in self._ends:
            self._ended = True  # of what is chosen after an end token nothing is kept
            return
        bound = self.binds
        part, is_mark = self._tracker.add(token)
        self._called = self._called or (is_mark and part == TOOL_CALL and self._part == ANSWER)
        if bound and not is_mark:
            self._matcher.consume_token(token)
            self._check()
            self._is_empty = False
        elif token == self._close:
            self._matcher, self._is_empty = self._start.deep_copy(), True

    def forced(self, max_tokens: int) -> Sequence[int]:
        """Return the tokens that spell what must come next, as the tokenizer cuts it; none where there is a choice.

        Args:
            max_tokens: the largest number of tokens.
        """
        if not self.binds or self._before_all():
            return []
        if self._matcher.is_stopped():  # complete
            return list(self._last)[:max_tokens] if len(self._last) == 1 else []
        return list(self._matcher.compute_ff_tokens())[:max_tokens]

    def num_allowed(self, drafts: Sequence[int]) -> int:
        """Return how many of the drafts may come next, in their order; all, where the grammar does not bind.

        Args:
            drafts: token ids. After what ends the part, or opens another, all are taken to be allowed.
        """
        if not self.binds:
            return len(drafts)
        if drafts and drafts[0] in self._before_all():
            return len(drafts)
        if self._matcher.is_stopped():
            return int(len(drafts) > 0 and drafts[0] in self._last)
        # To ask for an id beyond the tokenizer would spoil the matcher.
        marks = self._tracker.marks
        known = itertools.takewhile(lambda token: token < self._num_known and token not in marks, drafts)
        count = int(self._matcher.validate_tokens(list(known)))
        return len(drafts) if count < len(drafts) and drafts[count] == self._close else count

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"{self._what} cannot be followed ({_line(self._matcher.get_error())})")


def json_grammar(vocabulary: Vocabulary, schema: str | Mapping[str, Any]) -> Grammar:
    """Return the grammar of JSON texts that a JSON Schema describes.

    Args:
        vocabulary: the bundle's.
        schema: the schema, as a JSON text or parsed.

    Raises:
        InputError: it is no JSON, no schema, or uses a keyword that llguidance does not know.
    """
    from llguidance import LLMatcher

    try:
        document = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(document, Mapping):
            raise InputError(f"the JSON schema is {_line(json.dumps(document))}, expected an object")
        source = LLMatcher.grammar_from_json_schema(json.dumps(dict(document)), defaults=JSON_OPTIONS)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the JSON schema is not valid JSON ({_line(error)})") from error
    return Grammar(vocabulary, source, "the JSON schema")


def regex_grammar(vocabulary: Vocabulary, regex: str, what: str = "the regular expression") -> Grammar:
    """Return the grammar of texts that a regular expression matches from their first to their last character.

    Args:
        vocabulary: the bundle's.
        regex: in the syntax of Rust's crate `regex`, without look-around and back-references.
        what: names it in messages.

    Raises:
        InputError: it is malformed, or uses what llguidance does not know.
    """
    from llguidance import LLMatcher

    try:
        source = LLMatcher.grammar_from_regex(regex)
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid UTF-8 ({error.reason})") from error
    return Grammar(vocabulary, source, what)


def _line(message: object) -> str:
    """A message of llguidance in one line, without the state of its parser and shortened."""
    return f"{' '.join(str(message).partition('<state>')[0].split()):.200}"
