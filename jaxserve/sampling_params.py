"""How a request's tokens are chosen: what a user may ask, checked field by field. Imports nothing of jax."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from numbers import Integral, Real
from typing import Any

from jaxserve.errors import RequestError

MAX_SEED = 2**64 - 1
ALL_LOGPROBS = -1  # of ``logprobs`` and ``prompt_logprobs``: those of the whole vocabulary
MAX_ALL_LOGPROBS = 2**23  # values that one request may ask for so: some 100 bytes each
MAX_LOGIT_BIAS = 100.0  # as OpenAI's API: more than any two logits differ by
MAX_PENALTY = 2.0


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """The language that a completion's text is in. Exactly one of the fields is given.

    Attributes:
        json: a JSON schema, as text or as what ``json.loads`` makes of it; kept as text.
        json_object: True: any JSON object.
        regex: a regular expression in the syntax of Rust's ``regex``, for the whole text.
        choice: the texts to choose from.
        grammar: a context-free grammar in Lark's syntax (as `llguidance` reads it) with the rule ``start``.
    """

    json: Any = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    kind: str = dataclass_field(init=False, repr=False, compare=False)  # the name of the field that is given

    def __post_init__(self):
        field = "structured_outputs"
        if not isinstance(self.json_object, bool):
            raise RequestError(field, f"json_object={self.json_object!r} is not true or false")
        kinds = [f.name for f in fields(self) if f.init]
        given = [name for name in kinds if getattr(self, name) not in (None, False)]
        if isinstance(self.json, bool):  # a schema, too: of everything, or of nothing
            given = ["json", *(name for name in given if name != "json")]
        if len(given) != 1:
            raise RequestError(field, f"has {' and '.join(given) or 'nothing'}, give exactly one of {', '.join(kinds)}")
        object.__setattr__(self, "kind", given[0])
        if given == ["json"] and not isinstance(self.json, str):
            try:
                object.__setattr__(self, "json", json.dumps(self.json, ensure_ascii=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise RequestError(field, f"json is not a JSON schema: {error}") from None
        if given == ["choice"]:
            choice = self.choice
            if isinstance(choice, str) or not isinstance(choice, Iterable) or not (choice := tuple(choice)):
                raise RequestError(field, f"choice={choice!r} is not a sequence of one text or more")
            object.__setattr__(self, "choice", choice)
        texts = (getattr(self, self.kind),) if self.kind in ("json", "regex", "grammar") else self.choice or ()
        for text in texts:
            if not isinstance(text, str):
                raise RequestError(field, f"{self.kind} has {text!r}, which is not a text")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(field, f"{self.kind}: not valid Unicode at character {error.start}") from None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Everything a request may ask.

    Logit order: what may not be sampled (``structured_outputs``, ``allowed_token_ids``, ``bad_words``,
    ``min_tokens``), ``logit_bias``, penalties, temperature, ``top_k``, ``top_p`` over what ``top_k`` kept
    (renormalised), ``min_p``. Log-probabilities are of the raw distribution, before all of these.

    Attributes:
        max_tokens: output tokens at most; None means up to the engine's ``max_model_len``.
        min_tokens: before this many output tokens, end-of-sequence and ``stop_token_ids`` cannot be sampled and
            ``stop`` is not looked for.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        top_k: tokens kept; 0 or -1 is off. Ties with the k-th are kept.
        min_p: tokens of at least this fraction of the best one's probability are kept, in [0, 1].
        seed: same seed, same prompt, same params: same tokens, whatever the batch. None draws one.
        stop: strings that end the text; matched across token boundaries, cut from the output.
        stop_token_ids: ids that end the generation besides end-of-sequence.
        include_stop_str_in_output: keep the matched stop string in the text.
        ignore_eos: end-of-sequence does not end the generation.
        logprobs: log-probabilities of the k best tokens and the sampled one; 0 the sampled one's only; -1 all tokens';
            None none.
        skip_special_tokens: leave special tokens out of the text (not out of the ids).
        n: completions of the one prompt, told apart by their ``choice``; choice ``k`` has the seed ``seed + k``.
        presence_penalty: subtracted from the logit of a token that the output has, in [-2, 2].
        frequency_penalty: subtracted once for each time that the output has the token, in [-2, 2].
        repetition_penalty: the logit of a token that prompt or output has is divided by it where positive, multiplied
            where negative, before the other two penalties; more than 0, 1 is off (CTRL, Keskar et al. 2019).
        logit_bias: token id to what is added to its logit, in [-100, 100].
        allowed_token_ids: no other can be sampled; end-of-sequence only if it is among them.
        bad_words: texts that the output does not have: each as tokens, with and without a space before it. Of several
            tokens the last cannot be sampled after the others.
        prompt_logprobs: the same of each of the prompt's tokens but the first, given with the first output token. The
            prompt is then computed whole, without the prefix cache. Of ``n`` choices the first one has them.
        truncate_prompt_tokens: only so many of the prompt's last tokens are read.
        structured_outputs: the language that the text is in; a mapping of its fields will do. End-of-sequence can be
            sampled where the text is in it; a text that nothing can follow ends by itself, whatever ``min_tokens`` and
            ``ignore_eos`` say. Where other fields forbid all that it lets follow, the completion ends with the reason
            "abort".
        stream_interval: tokens that a stream's message waits for, so that a slow reader or a fast model costs fewer of
            them. A choice's first token and its last wait for nothing. (``Engine.stream`` gives tokens one by one.)
        stream_max_delay_s: seconds that a token waits at most for others.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputs | None = None
    stream_interval: int = 1
    stream_max_delay_s: float = 0.5

    def __post_init__(self):
        for name in ("stop", "stop_token_ids", "bad_words"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                value = (value,) if value is not None else ()
            if not isinstance(value, Iterable):
                raise RequestError(name, f"{value!r} is not a sequence")
            object.__setattr__(self, name, tuple(value))
        optional = ("max_tokens", "seed", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
        for name in ("min_tokens", "top_k", "n", "stream_interval", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if type(value) is int:  # nearly always; asking an abstract class takes ten times as long
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise RequestError(name, f"{value!r} is not an integer")
            object.__setattr__(self, name, int(value))
        penalties = ("presence_penalty", "frequency_penalty")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "stream_max_delay_s", *penalties):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise RequestError(name, f"{value!r} is not a finite number")
            object.__setattr__(self, name, float(value))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(name, f"{value!r} is not true or false")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError("max_tokens", f"{self.max_tokens} must be at least 1")
        if self.min_tokens < 0:
            raise RequestError("min_tokens", f"{self.min_tokens} must be at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", f"{self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.temperature < 0:
            raise RequestError("temperature", f"{self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise RequestError("top_p", f"{self.top_p} must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise RequestError("min_p", f"{self.min_p} must be in [0, 1]")
        if self.top_k < -1:
            raise RequestError("top_k", f"{self.top_k} must be -1 or 0 (off) or positive")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise RequestError("seed", f"{self.seed} must be in [0, {MAX_SEED}]")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None and value < ALL_LOGPROBS:
                raise RequestError(name, f"{value} must be {ALL_LOGPROBS} (all) or at least 0")
        for name in ("n", "stream_interval"):
            if getattr(self, name) < 1:
                raise RequestError(name, f"{getattr(self, name)} must be at least 1")
        if self.stream_max_delay_s < 0:
            raise RequestError("stream_max_delay_s", f"{self.stream_max_delay_s} must be at least 0")
        for name in penalties:
            if not -MAX_PENALTY <= getattr(self, name) <= MAX_PENALTY:
                raise RequestError(name, f"{getattr(self, name)} must be in [{-MAX_PENALTY:g}, {MAX_PENALTY:g}]")
        if self.repetition_penalty <= 0:
            raise RequestError("repetition_penalty", f"{self.repetition_penalty} must be more than 0")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
            raise RequestError("truncate_prompt_tokens", f"{self.truncate_prompt_tokens} must be at least 1")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError("stop", "every stop must be a non-empty string")
        if any(not isinstance(s, str) or not s.strip() for s in self.bad_words):
            raise RequestError("bad_words", "every word must be a string of more than spaces")
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise RequestError("allowed_token_ids", "0 tokens are allowed, at least 1 must be")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.structured_outputs is not None:
            object.__setattr__(self, "structured_outputs", _structured_outputs(self.structured_outputs))


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise RequestError(name, f"{values!r} is not a sequence")
    values = tuple(values)
    for i in values:
        if isinstance(i, bool) or not isinstance(i, Integral) or i < 0:
            raise RequestError(name, f"{i!r} is not a token id")
    return tuple(int(i) for i in values)


def _structured_outputs(value: Any) -> StructuredOutputs:
    if isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, Mapping):
        raise RequestError("structured_outputs", f"{value!r} has none of its fields")
    known = [f.name for f in fields(StructuredOutputs) if f.init]
    for name in value:
        if name not in known:
            raise RequestError("structured_outputs", f"{name!r} is not one of {', '.join(known)}")
    return StructuredOutputs(**value)


def _logit_bias(values: Any) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise RequestError("logit_bias", f"{values!r} does not map token ids to numbers")
    ids = _token_ids("logit_bias", values)
    for i, bias in zip(ids, values.values(), strict=True):
        number = isinstance(bias, Real) and not isinstance(bias, bool)
        if not number or not -MAX_LOGIT_BIAS <= float(bias) <= MAX_LOGIT_BIAS:
            limits = f"[{-MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]"
            raise RequestError("logit_bias", f"{bias!r} of token {i} is not a number in {limits}")
    return {i: float(bias) for i, bias in zip(ids, values.values(), strict=True)}


_KNOWN = frozenset(f.name for f in fields(SamplingParams))


def sampling_params_from(values: dict[str, Any]) -> SamplingParams:
    """``SamplingParams`` from a mapping of set fields; an unknown name is refused by name."""
    for name in values:
        if name not in _KNOWN:
            raise RequestError(name, "unknown sampling field")
    return SamplingParams(**values)
