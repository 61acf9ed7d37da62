"""What one ``Engine.step`` did and where the host's time went."""

from typing import NamedTuple

from jaxserve.scheduler.batch import ScheduledBatch
from jaxserve.scheduler.stages import Tick


class StepTimes(NamedTuple):
    """Seconds of the host by part of one step, the batch that it scheduled, and what it dispatched: at lookahead 0 only
    the first tick of it. None: it scheduled none; it only read one.

    ``wait_s`` and ``commit_s`` are of the steps that were read at the end, with lookahead those before. What the
    device has no part in is ``host_s``; while a step is in flight it costs nothing.
    """

    batch: ScheduledBatch | None
    tick: Tick | None
    num_read: int  # steps, at the end; those that structured output waited for are not among them
    schedule_s: float
    build_s: float  # the step's inputs, in numpy
    dispatch_s: float  # the copy to the device, and the runtime's calls
    wait_s: float  # until the outputs are there
    commit_s: float  # tokens into sequences and events
    masks_s: float  # what structured output lets follow

    @property
    def host_s(self) -> float:
        """Schedule, build, commit and masks."""
        return self.schedule_s + self.build_s + self.commit_s + self.masks_s


SECONDS = tuple(name for name in StepTimes._fields if name.endswith("_s"))
