"""What is asked of an engine and what comes back, as frozen values. Imports nothing of jax."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from jaxserve.sampling_params import ALL_LOGPROBS, MAX_SEED, SamplingParams

FinishReason = Literal["stop", "length", "abort", "deadline"]
Pooling = Literal["last", "mean"]  # of a prompt's final hidden states: the last token's, or the mean over all

STEP_TOKEN_BOUNDS = tuple(2**i for i in range(15))  # by which steps are counted (EngineStats.steps_by_size)


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """A LoRA adapter that an engine serves.

    Attributes:
        name: as requests name it.
        slot: of the device's adapters.
        generation: number of its load, the engine's first is 1: what is loaded later under the same name is another.
        rank: of its matrices.
        path: where it was read from; None for live arrays.
    """

    name: str
    slot: int
    generation: int
    rank: int
    path: str | None = None


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
    client: str = ""  # who asks: the waiting queue is fair among these
    trace_context: tuple[tuple[str, str], ...] = ()  # headers of W3C trace context: whose span this belongs to
    bad_sequences: tuple[tuple[int, ...], ...] = ()  # the params' bad_words as tokens, none empty
    choice: int = 0  # of the params' n completions the one that this is
    group_id: str | None = None  # request_id of the request whose choice this is; None where n is 1
    grammar: Any = None  # the params' structured_outputs as a text.grammar.Grammar
    pooling: Pooling | None = None  # an embedding of the prompt is wanted, and no token
    normalize: bool = True  # of the embedding: its length is 1
    adapter: LoadedAdapter | None = None  # None: the base model

    @property
    def prefix_root(self) -> bytes:
        """What besides its tokens the KV of a prompt depends on: the adapter, and which load of it."""
        return b"" if self.adapter is None else b"lora %d" % self.adapter.generation

    @property
    def is_constrained(self) -> bool:
        """Whether its tokens depend on more than the step's inputs say: see ``constraint_io``."""
        p = self.params
        return bool(
            p.presence_penalty
            or p.frequency_penalty
            or p.repetition_penalty != 1
            or p.logit_bias
            or p.allowed_token_ids
            or self.bad_sequences
        )

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt's tokens are wanted."""
        return self.params.prompt_logprobs is not None and self.choice == 0

    @property
    def is_aside(self) -> bool:
        """Whether it asks of a step's hidden states something besides the next token."""
        return self.scores_prompt or self.params.logprobs == ALL_LOGPROBS or self.pooling is not None

    @property
    def wants_whole_prompt(self) -> bool:
        """Whether the hidden states of all its prompt's tokens are: they are not in the KV cache."""
        return self.scores_prompt or self.pooling == "mean"

    def choices(self) -> list["Request"]:
        """One request for each of the params' ``n`` completions; their ids are no user's."""
        if self.params.n == 1:
            return [self]
        return [
            replace(
                self,
                request_id=f"{self.request_id}\0{k}",
                group_id=self.request_id,
                choice=k,
                seed=(self.seed + k) & MAX_SEED,
            )
            for k in range(self.params.n)
        ]


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens whose KV came from the prefix cache at first admission
    admitted_at: float | None = None  # time.monotonic() seconds of that; None: it was never admitted


class TokenEvent(NamedTuple):
    """One output token of one request, or its end. The last event of each choice of a request (there is one, or
    ``n``) has ``finish_reason`` and the choice's ``usage``.

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
    # The stop id or stop string that ended it, None for end-of-sequence; why, where structured output was aborted.
    stop_reason: int | str | None = None
    usage: Usage | None = None
    choice: int = 0  # which of the request's n completions
    prompt_logprobs: tuple["TokenLogprobs | None", ...] | None = None  # of each prompt token; the first has none
    embedding: Any = None  # [D] f32 numpy, on the only event of a request for one
    num_open: int = 0  # choices of the request that go on after this event; counted where ``finish_reason`` is set

    @property
    def ends_request(self) -> bool:
        """No event of the request comes after this one."""
        return self.finish_reason is not None and self.num_open == 0


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, raw distribution."""

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
    choice: int = 0  # which of the request's n completions
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of each prompt token, the first has none; of choice 0


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A prompt as a vector, as ``Engine.embed`` returns it."""

    request_id: str
    values: Any  # [D] f32 numpy
    prompt_len: int


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
    step_tokens: int = 0  # computed by all steps, prompt and decode
    loras: tuple["LoraLoad", ...] = ()  # of the adapters that are loaded, or unloaded and still in use
    steps_by_size: tuple[int, ...] = ()  # steps of at most STEP_TOKEN_BOUNDS[i] tokens; one more for larger ones
    replicas: tuple["EngineStats", ...] = ()  # of each, where there are several; without ``loras``


@dataclass(frozen=True, kw_only=True)
class LoraLoad:
    """Requests (of several completions: each of them) that use one adapter now."""

    name: str
    num_running: int
    num_waiting: int


@dataclass(frozen=True, kw_only=True)
class HeldPages:
    """One unfinished sequence and the pages it holds, in order of position; none while it waits."""

    request_id: str
    choice: int
    num_tokens: int  # prompt and output
    num_output_tokens: int
    is_running: bool
    num_preemptions: int
    pages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PageMap:
    """Who holds which KV pages now: those neither held nor cached are free. A page of several sequences is shared."""

    num_pages: int
    page_size: int
    cached: tuple[int, ...]  # held by nobody, kept for their prefix
    sequences: tuple[HeldPages, ...]
