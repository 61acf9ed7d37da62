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
        self.order = (self.request.priority, self.request.arrival, self.number)
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Committed output tokens."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def total_len(self) -> int:
        """Tokens including those that were sampled and are not read yet."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV no dispatched step writes: 1 for a sequence that decodes."""
        return len(self.tokens) + self.num_in_flight - self.num_computed
