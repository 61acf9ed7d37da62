"""Structured output: which tokens may follow, so that a completion's text is in the language that a request names.

The parsers are those of `llguidance`, which tells for a sequence of tokens the set of the next ones, packed to bits, in
tens of microseconds. Their limits bound the time and the memory of a hostile grammar: it is refused, or ends its own
request.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.constraint_io import set_bits
from jaxserve.errors import RequestError
from jaxserve.sampling_params import StructuredOutputs
from jaxserve.text.tokenizer import Tokenizer

FIELD = "structured_outputs"
MAX_GRAMMAR_BYTES = 256 * 1024  # of a schema, expression or grammar as text
# A model that has lost its way fills max_tokens with spaces where it may.
JSON_DEFAULTS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
NUM_PROBED = 3  # tokens that are tried before a grammar is taken
MAX_CACHED = 64  # grammars that are kept for the next request with the same one

# Fuel is some 50 us a thousand; a lexer state is 1 to 2 kB.
LIMITS = {
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # they would quote the parser's inside
}


class Grammar:
    """One request's language, compiled. Immutable: any thread may ask for matchers of its sequences.

    Attributes:
        end_ids: what ends a generation, whatever the request.
        num_words: W: int32 words that hold a bit for each token id.
    """

    def __init__(self, prototype: Any, end_ids: Sequence[int], num_words: int):
        self._prototype = prototype
        self.end_ids, self.num_words = tuple(end_ids), num_words

    def matcher(self) -> "Matcher":
        """At the beginning of a text."""
        return Matcher(self._prototype.deep_copy())


class Matcher:
    """Where one sequence is in its grammar. One thread at a time."""

    def __init__(self, matcher: Any):
        self._matcher = matcher  # read by ``Filler``, too

    def consume(self, token: int) -> bool:
        """Goes on by a token; False, and nothing but an ``error`` from then on, where it cannot follow."""
        return self._matcher.consume_token(token)

    @property
    def is_accepting(self) -> bool:
        """The text so far is in the language."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """The text so far is in the language, and no longer one that begins with it is."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the matcher is of no use any more, on one line."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def fill(self, allowed: np.ndarray) -> None:
        """Makes ``allowed`` [W] i32 the bits (i % 32 of word i // 32) of the tokens that may follow.

        What ends a text is not the grammar's: such ids' bits are the caller's to set, by ``is_accepting``.
        """
        self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)


class Filler:
    """Fills many matchers' bits at once, in threads that need no interpreter."""

    def __init__(self):
        self._executor: Any = None  # made for the first batch that has use for it

    def fill(self, matchers: Sequence[tuple[Matcher, int]], allowed: np.ndarray) -> None:
        """``Matcher.fill`` of the rows of ``allowed`` [B, W] that the matchers are given with."""
        if len(matchers) == 1:
            matcher, row = matchers[0]
            matcher.fill(allowed[row])
            return
        if self._executor is None:
            import llguidance

            self._executor = llguidance.LLExecutor()
        listed = [(matcher._matcher, row) for matcher, row in matchers]
        self._executor.unsafe_compute_mask_ptr(listed, allowed.ctypes.data, allowed.strides[0], len(allowed))


class GrammarCompiler:
    """Compiles requests' structured outputs for one tokenizer and one model's vocabulary. Any thread.

    Args:
        vocab_size: rows of the model's embedding (V).
        end_ids: what ends a generation; the tokenizer has to have at least one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = [i for i in end_ids if i < vocab_size]
        self._lock = threading.Lock()
        self._vocabulary: Any = None  # llguidance's, made for the first request that needs it
        self._cached: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()

    def compile(self, asked: StructuredOutputs) -> Grammar:
        """The grammar of ``asked``, its first tokens tried.

        Raises:
            RequestError: what is wrong with it, or that it is beyond a limit; names the kind.
        """
        with self._lock:
            if (found := self._cached.get(asked)) is not None:
                self._cached.move_to_end(asked)
                return found
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
        grammar = self._compile(asked)
        with self._lock:
            self._cached[asked] = grammar
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        return grammar

    def _compile(self, asked: StructuredOutputs) -> Grammar:
        import llguidance

        kind, value = asked.kind, getattr(asked, asked.kind)
        text = json.dumps(value) if kind == "choice" else value
        if isinstance(text, str) and (num_bytes := len(text.encode())) > MAX_GRAMMAR_BYTES:
            raise RequestError(FIELD, f"{kind} of {num_bytes} bytes, at most {MAX_GRAMMAR_BYTES} are taken")
        make = llguidance.LLMatcher
        try:
            source = _source(make, kind, value)
        except ValueError as error:
            raise RequestError(FIELD, f"{kind}: {_first_line(str(error))}") from None
        prototype = make(self._vocabulary, source, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
        num_words = -(-self._vocab_size // 32)
        # Much is built when it is first needed: here, where it can still be refused.
        probe, allowed = Matcher(prototype), np.zeros(num_words, np.int32)
        for step in range(NUM_PROBED):
            if probe.error is None:
                probe.fill(allowed)
            if probe.error is not None:
                raise RequestError(FIELD, f"{kind}: {probe.error}")
            if step == 0 and not allowed.any() and not probe.is_accepting:
                raise RequestError(FIELD, f"{kind}: none of its texts begins with a token of this model")
            if step == 0:
                probe = Matcher(prototype.deep_copy())
            set_bits(allowed, self._end_ids, False)
            if not allowed.any():
                break
            probe.consume(int(np.argmax(np.unpackbits(allowed.view(np.uint8), bitorder="little"))))
        return Grammar(prototype, self._end_ids, num_words)

    def _make_vocabulary(self) -> Any:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise RequestError(FIELD, "this server lacks the package llguidance") from None
        if not self._end_ids:
            raise RequestError(FIELD, "the model has no end-of-sequence: a text could not end")
        words = Vocabulary(self._tokenizer, self._vocab_size, self._end_ids)
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(words), n_vocab=self._vocab_size, eos_token=self._end_ids
        )


class Vocabulary:
    """A tokenizer as `llguidance` wants to see one: the bytes of each id, and the tokens of a text that must follow.

    Attributes:
        tokens: bytes of every id; none where an id has no text, which is then never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = end_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = [i for i in range(vocab_size) if tokenizer.is_special(i) or i in end_ids]
        special = set(self.special_token_ids)
        self._ids = {data: i for i, data in enumerate(self.tokens) if data and i not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are exactly those of ``text``: the tokenizer's own where it gives such, as in the middle
        of a text."""
        if isinstance(text, bytes):
            raise TypeError("a text is wanted, not bytes")
        data = text.encode()
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        given = [self.tokens[i] if i < len(self.tokens) else b"" for i in ids]
        joined = b"".join(given)
        if joined == data:
            return ids
        if joined == b" " + data:  # put in front by the encoder, which takes it for a text's beginning
            return [*self._longest_first(given[0][1:]), *ids[1:]]
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        """Tokens of ``data``, each the longest that fits; as far as there are any."""
        ids, start = [], 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                if (i := self._ids.get(data[start:end])) is not None:
                    ids.append(i)
                    start = end
                    break
            else:
                break
        return ids


def _source(make: Any, kind: str, value: Any) -> str:
    """The grammar as `llguidance` takes it. Raises ValueError for what is no JSON."""
    match kind:
        case "json":
            schema = "{}" if value.strip() == "true" else value  # the schema of everything
            return make.grammar_from_json_schema(schema, defaults=JSON_DEFAULTS)
        case "json_object":
            return make.grammar_from_json_schema('{"type": "object"}', defaults=JSON_DEFAULTS)
        case "regex":
            return make.grammar_from_regex(value)
        case "choice":
            return make.grammar_from_regex("|".join(map(_literal, value)))
        case _:
            return make.grammar_from_lark(value)


def _literal(text: str) -> str:
    """A regular expression of ``text`` alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _first_line(error: str) -> str:
    """What of a library's message is for a user; positions that it points at are left out."""
    return (error.strip().splitlines() or ["it cannot go on"])[0][:300]
