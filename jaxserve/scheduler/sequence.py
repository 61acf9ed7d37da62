"""One request on its way through the engine: the mutable side of a Request."""

from dataclasses import dataclass, field
from typing import Literal

from jaxserve.request import FinishReason, Request

Status = Literal["waiting", "running", "finished"]

NO_SLOT = -1


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and what it holds. Written by the Scheduler only.

    Attributes:
        number: order of ``Scheduler.add``; breaks ties.
        needs_more: its steps do more than give it a token: they read hidden states, or wait for a grammar.
        shares_with: the sequence that computes the prompt for this one too; None for one by itself.
        order: sort key, best first: lower priority value, earlier arrival, lower number.
        tokens: prompt and committed output token ids.
        num_computed: tokens whose KV is in ``pages``, or will be once the dispatched steps have run.
        num_in_flight: tokens sampled by dispatched steps and not committed yet: at most ``lookahead`` when ``schedule``
            begins, one more while a batch of the sequence was scheduled and those before are not committed.
        in_stages: a step that samples its next token has entered the stages of the mesh and not left them. Always False
            where there is one.
        pages: page ids in order of position; empty unless running.
        slot: engine row, NO_SLOT unless running.
        num_cached: prompt tokens found in the prefix cache at first admission.
        admitted_at: when that was, by the scheduler's clock.
        num_charged: output tokens that its client's counter has; see ``waiting``.
        num_preemptions: times its pages were taken and had to be recomputed.
        digests: chained digests of the full pages of ``tokens``, as far as they were needed.
        num_registered: leading pages of ``pages`` already offered to the prefix index.
    """

    request: Request
    number: int
    shares_with: "Sequence | None" = None
    # Of the request, as a step reads them for every row.
    request_id: str = field(init=False)
    prompt_len: int = field(init=False)
    max_total_len: int = field(init=False)
    needs_more: bool = field(init=False)
    order: tuple[int, float, int] = field(init=False)
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    num_in_flight: int = 0
    in_stages: bool = False
    pages: list[int] = field(default_factory=list)
    slot: int = NO_SLOT
    status: Status = "waiting"
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    num_charged: int = 0
    num_preemptions: int = 0
    admitted_once: bool = False
    admitted_at: float | None = None
    digests: list[bytes] = field(default_factory=list)
    num_registered: int = 0

    def __post_init__(self):
        request = self.request
        self.request_id, self.max_total_len = request.request_id, request.max_total_len
        self.prompt_len = len(request.prompt_token_ids)
        self.needs_more = request.is_aside or request.grammar is not None
        self.order = (request.priority, request.arrival, self.number)
        self.tokens = list(request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Committed output tokens."""
        return len(self.tokens) - self.prompt_len

    @property
    def total_len(self) -> int:
        """Tokens including those that were sampled and are not read yet."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV no dispatched step writes: 1 for a sequence that decodes."""
        return len(self.tokens) + self.num_in_flight - self.num_computed
