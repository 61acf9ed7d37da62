"""What is compiled for TPUs that are not there."""

from typing import NamedTuple

from jaxserve.step_io import Bucket


class StepCase(NamedTuple):
    topology: str  # a slice, as XLA names it
    stage: int
    tensor: int
    bucket: Bucket


DECODE, MIXED = Bucket(32, 0, 0), Bucket(32, 128, 4)
STEPS = {
    "2x2-tensor-4-decode": StepCase("v5e:2x2", 1, 4, DECODE),
    "2x2-tensor-4-mixed": StepCase("v5e:2x2", 1, 4, MIXED),
    "2x4-tensor-8-decode": StepCase("v5e:2x4", 1, 8, DECODE),
    "2x4-stage-2-tensor-4-decode": StepCase("v5e:2x4", 2, 4, DECODE),
}
