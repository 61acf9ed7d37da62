"""Steps on their way through the stages of a pipeline: what each tick is given, and how the running sequences share it.

**One tick** is one call of the compiled step. In it every stage computes its own layers for the step that is there,
all at the same time: stage 0 takes up the step that enters, stage ``s`` the one that entered ``s`` ticks ago, and the
last stage has the logits of the one that entered ``ST - 1`` ticks ago. The activations stay on the devices, where the
next tick finds them and takes them a stage further by one ``ppermute`` (``DeviceState.hidden``). With one stage a step
enters and leaves in the same tick.

**Across steps**, not within one: a step is not cut into microbatches that would drain at its end, with its bubble of
``(ST - 1) / (MB + ST - 1)``. The sequences that decode are shared out over ``ST`` steps that follow each other
(``Shares``). The token of one of them is sampled after its last tick and before its sequence enters again, ``ST`` ticks
after it entered; it stays on the device, and the host reads it a tick late, as without stages. So in steady state no
stage is ever idle. A prompt's chunks follow each other without waiting: each stage has written the keys of one before
the next comes. Stages are idle while there is less to do than ``ST`` steps: at a start, at an end, and with fewer
sequences than stages. With lookahead 0 every step leaves before the next is scheduled: one at a time, for comparison.

**One shape a tick.** A tick is compiled for one bucket, and the steps in the stages may have been scheduled for
several: all are laid out for the smallest bucket that holds each (``batch.common_bucket``, ``batch.laid_out``; rows
move, tokens do not, so the activations stay as they are). The pipeline never drains to change its bucket, and no shape
beyond those of ``batch.all_buckets`` is compiled. The padding takes no time of its own: a stage that is done earlier
would wait for the one with the large step. The inputs of all steps in the stages go to the devices in each tick;
together they are as many bytes as those of one step of all the rows.

**Order** is all that the scheduler counts on, and it holds stage by stage: a page or slot that is given away while a
step is on its way is written by its new owner in a later step. What the sampler is told of slots travels with the step
(``Entered.loads``) and is loaded when the step leaves.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.batch import ScheduledBatch, common_bucket, laid_out
from jaxserve.step_io import Bucket, StepDims, StepInputs, new_inputs


class Entered(NamedTuple):
    """A step in the stages."""

    batch: ScheduledBatch
    buffer: np.ndarray  # i32, of ``step_io.new_inputs``, for the batch's bucket
    inputs: StepInputs  # views into it
    loads: list[np.ndarray]  # ``batch.slot_loads``

    @property
    def has_adapters(self) -> bool:
        return self.inputs.adapter_ids is not None and bool((self.inputs.adapter_ids >= 0).any())


class Tick(NamedTuple):
    """What the devices run next."""

    bucket: Bucket
    buffers: np.ndarray  # [ST, NI] i32, the inputs of the step in each stage
    leaving: Entered | None  # whose logits the tick has, laid out for ``bucket``; None: padding
    has_adapters: bool  # whether a token of any of its steps has one
    num_busy: int  # stages that have a step
    num_rows: int  # of all their steps


class Stages:
    """The steps between entering and leaving.

    Attributes:
        num_stages: ST.
        num_ticks: since the start.
        num_idle: stages that had no step, summed over the ticks.
    """

    def __init__(self, config: SchedulerConfig, dims: StepDims):
        self.num_stages = config.num_stages
        self._config, self._dims = config, dims
        self.num_ticks = self.num_idle = 0
        self._steps: deque[Entered | None] = deque()  # the youngest first, ST - 1 between two ticks
        self.clear()

    @property
    def is_busy(self) -> bool:
        """Whether a step is on its way."""
        return any(step is not None for step in self._steps)

    def batches(self) -> list[ScheduledBatch]:
        """Those on their way, oldest first."""
        return [step.batch for step in reversed(self._steps) if step is not None]

    def clear(self) -> None:
        """Forgets them."""
        self._steps = deque([None] * (self.num_stages - 1))

    def tick(self, entering: Entered | None) -> Tick:
        """Takes up ``entering``, takes the others a stage further and lets the oldest leave. There is one at least."""
        steps = [entering, *self._steps]
        present = [step for step in steps if step is not None]
        bucket = common_bucket(self._config, [step.batch.bucket for step in present])
        placed = [None if step is None else self._laid_out(step, bucket) for step in steps]
        if self.num_stages == 1:
            buffers = present[0].buffer[None]
        else:
            padding = new_inputs(bucket, self._dims)[0]
            buffers = np.stack([padding if step is None else step.buffer for step in placed])
        self.num_ticks += 1
        self.num_idle += self.num_stages - len(present)
        self._steps.appendleft(entering)
        self._steps.pop()
        return Tick(
            bucket,
            buffers,
            leaving=placed[-1],
            has_adapters=any(step.has_adapters for step in present),
            num_busy=len(present),
            num_rows=sum(len(step.batch.rows) for step in present),
        )

    def _laid_out(self, step: Entered, bucket: Bucket) -> Entered:
        if step.batch.bucket == bucket:
            return step
        return Entered(*laid_out(step.batch, step.inputs, bucket, self._dims), step.loads)


class Shares:
    """How many of the sequences that decode enter the stages with each step: as even a share as there is.

    Of any ``num_steps`` steps in a row, ``num_decoding % num_steps`` have one more than the others. Steps that have
    become uneven, since sequences ended, are evened out as those that are over their share leave a row to the next.
    """

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._recent: deque[int] = deque([0] * (num_steps - 1), maxlen=num_steps - 1)  # rows of the steps before

    def next(self, num_decoding: int) -> int:
        """Rows at most, of ``num_decoding`` in all, in the stages or ready to enter: one at least."""
        each, more = divmod(num_decoding, self._num_steps)
        return max(1, each + (sum(num > each for num in self._recent) < more))

    def took(self, num_rows: int) -> None:
        """So many of them are in the step that enters."""
        self._recent.append(num_rows)
