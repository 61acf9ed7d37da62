"""What a user asks for and what comes back, as frozen values. Imports nothing of jax."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "deadline"]

MAX_SEED = 2**64 - 1


NOT_IMPLEMENTED: dict[str, float | None] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "prompt_logprobs": None,
    "truncate_prompt_tokens": None,
}  # SamplingParams field -> the one value that is taken, because it changes nothing


class RequestError(ValueError):
    """A request that cannot be served. ``field`` names the offending field; the message has both numbers."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class QueueFullError(RuntimeError):
    """The waiting queue is full; the request was not taken. Retry later."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Everything a request may ask. A field that is not implemented yet is refused by name, never ignored.

    Logit order: ``min_tokens`` suppression, temperature, ``top_k``, ``top_p`` over what ``top_k`` kept (renormalised),
    ``min_p``. Log-probabilities are of the raw distribution, before all of these.

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
        logprobs: log-probabilities of the k best tokens and the sampled one; 0 the sampled one's only; None none.
        skip_special_tokens: leave special tokens out of the text (not out of the ids).
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
    # Names the field knows that are not implemented yet: only the neutral value is taken (see NOT_IMPLEMENTED).
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self):
        for name, neutral in NOT_IMPLEMENTED.items():
            value = getattr(self, name)
            same = value is None if neutral is None else isinstance(value, Real) and value == neutral
            if not same:
                raise RequestError(name, f"{value!r}: not implemented yet, leave it unset")
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                value = (value,) if value is not None else ()
            if not isinstance(value, Iterable):
                raise RequestError(name, f"{value!r} is not a sequence")
            object.__setattr__(self, name, tuple(value))
        for name in ("max_tokens", "min_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed", "logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise RequestError(name, f"{value!r} is not an integer")
            object.__setattr__(self, name, int(value))
        for name in ("temperature", "top_p", "min_p"):
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
        if self.logprobs is not None and self.logprobs < 0:
            raise RequestError("logprobs", f"{self.logprobs} must be at least 0")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError("stop", "every stop must be a non-empty string")
        for i in self.stop_token_ids:
            if isinstance(i, bool) or not isinstance(i, Integral) or i < 0:
                raise RequestError("stop_token_ids", f"{i!r} is not a token id")
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One admitted-to-be sequence. Token ids and params are already checked against the engine's limits."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_total_len: int  # prompt and output tokens together, at most (max_tokens and max_model_len folded in)
    stop_token_ids: tuple[int, ...]  # ids that end this request: end-of-sequence (unless ignored) and the params'
    seed: int  # resolved
    priority: int = 0  # lower is served first
    deadline: float | None = None  # time.monotonic() seconds
    arrival: float = 0.0  # time.monotonic() seconds


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens whose KV came from the prefix cache at first admission


class TokenEvent(NamedTuple):
    """One output token of one request, or its end. The last event of a request has ``finish_reason`` and ``usage``.

    A tuple, made in a third of a frozen dataclass's time: a step makes one for each of its sequences.

    ``text`` is what became final with this token: it may be empty (half a character, a possible stop string) and may
    hold text of earlier tokens. The texts of a request's events concatenated are its completion's text.
    ``token_id`` is None on an event that only ends the request (abort, deadline).
    """

    request_id: str
    index: int  # of the token in the output, from 0
    token_id: int | None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None  # (token id, logprob), descending
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop id or stop string that ended it, None for end-of-sequence
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one output position, raw distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), descending


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished request, as ``Engine.generate`` returns it."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_len: int
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Figures of an engine now; counts are since its start, prefix cache figures in tokens."""

    num_running: int
    num_waiting: int
    num_active_rows: int  # of the last scheduled step
    num_pages: int
    num_pages_held: int
    num_tokens_held: int
    num_tokens_reserved: int  # room in the held pages that holds no token yet and will, if all reach their longest
    num_pages_cached: int  # unreferenced, kept for their prefix
    kv_cache_usage: float  # 0..1, pages held / pages
    kv_fragmentation: float  # 0..1, share of the held pages' room that holds no token
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    num_steps: int
    prompt_tokens: int
    generation_tokens: int
    recompilations_after_ready: int


def sampling_params_from(values: dict[str, Any]) -> SamplingParams:
    """``SamplingParams`` from a mapping of set fields; an unknown name is refused by name."""
    known = {f.name for f in fields(SamplingParams)}
    for name in values:
        if name not in known:
            raise RequestError(name, "unknown sampling field")
    return SamplingParams(**values)
