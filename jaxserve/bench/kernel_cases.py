"""What ``bench kernels`` times: cases of a model's shapes, and the ways to compute each.

A way is a program of several calls. Each waits for the one before, as it does in a step, and has inputs of its own: up
to 16 calls, so that they are together larger than the caches, unless they are small.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.bench.roofline import Work
from jaxserve.config import ModelConfig
from pallas_kernels import dispatch
from pallas_kernels.int4_matmul.gpu_stream import Tuning as ProductTuning
from pallas_kernels.paged_attention.gpu_prefill import Tuning as PrefillTuning
from pallas_kernels.paged_attention.gpu_split import Tuning as DecodeTuning

MAX_CALLS = 16  # of a program


class Way(NamedTuple):
    """One way to compute something.

    Attributes:
        implementation: of ``pallas_kernels.dispatch``, or what of XLA's own it is.
        is_selected: whether an engine on this device computes it so.
        work: of one call: each array that it is given read once, each that it returns written once.
        build: makes its inputs, and a function that runs the program once and returns what is to be waited for.
        num_calls: of the program.
    """

    implementation: str
    is_selected: bool
    work: Work
    build: Callable[[], Callable[[], Any]]
    num_calls: int


class Case(NamedTuple):
    """Something to compute, ``about`` says what, and the ways to do so."""

    kernel: str
    about: dict[str, Any]
    ways: list[Way]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the cases are made for.

    Attributes:
        batches: tokens of products, rows of decode attention.
        context: keys of a decode row.
        prompt_lens: of prefill attention, one prompt at a time.
        rotated_bytes: that the inputs of a program have at least, several times the last cache.
        tuning: fields of the Hopper kernels' ``Tuning`` that have other values than their defaults.
    """

    config: ModelConfig
    dtype: jnp.dtype
    batches: Sequence[int]
    context: int
    prompt_lens: Sequence[int]
    page_size: int
    rotated_bytes: int
    tuning: dict[str, Any]

    def num_copies(self, num_bytes: int) -> int:
        return max(2, min(MAX_CALLS, -(-self.rotated_bytes // max(1, num_bytes))))

    def check_tuning(self) -> None:
        """Raises ValueError where no kernel has all the fields of ``tuning``; names them."""
        kinds = (ProductTuning, DecodeTuning, PrefillTuning)
        fields = [{f.name for f in dataclasses.fields(kind)} for kind in kinds]
        if not any(self.tuning.keys() <= names for names in fields):
            known = ", ".join(sorted(set().union(*fields)))
            raise ValueError(f"tuning: no kernel has all of {', '.join(self.tuning)}; there are {known}")

    def tuned(self, default: Any) -> Any:
        """``default``, a ``Tuning``, with what was asked; None where nothing was, or it has no such fields."""
        fields = {f.name for f in dataclasses.fields(default)}
        return dataclasses.replace(default, **self.tuning) if self.tuning and self.tuning.keys() <= fields else None


def on_hopper() -> bool:
    return dispatch.is_hopper(jax.devices()[0])
