"""Mosaic GPU's interpreter on the CPU, with race detection, and the one instruction our kernels need that it lacks.

Jax 0.11.2 does not interpret a matrix product whose left operand is in registers. What is added here has the form of
the interpreter's own rules and reaches into ``jax._src``: jax is pinned, and another version may need another rule.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax._src import callback, state  # pyright: ignore[reportPrivateImportUsage]
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as _gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, jaxpr_interpret
from jax.experimental.pallas import mosaic_gpu as plgpu

gpu_callbacks: Any = _gpu_callbacks
_interpreter: Any = next(
    c for c in vars(jaxpr_interpret).values() if isinstance(c, type) and hasattr(c, "_interpret_wgmma_ref_p")
)
_from_shared_memory = _interpreter._interpret_wgmma_ref_p


@gpu_callbacks.fail_on_exception
def _product(
    *, token, mesh_location, thread, acc_key, acc_transforms, a, b_key, b_transforms, source_info=None
):  # fmt: skip
    """acc += a @ b with ``a`` a value, acc and b buffers of the interpreted machine."""
    memory = gpu_callbacks._get_shared_memory()
    acc_at = gpu_callbacks.HostAllocationKey.from_array(acc_key)
    b_at = gpu_callbacks.HostAllocationKey.from_array(b_key)

    def plain(transforms):
        return jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))

    log = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
    b, _, _ = memory.get_buffer_content(b_at, memory.access(b_at, plain(b_transforms)), thread, logging_info=log)
    where = memory.access(acc_at, plain(acc_transforms))
    acc, _, _ = memory.get_buffer_content(acc_at, where, thread, logging_info=log)
    memory.store_buffer_content(
        acc_at, where, acc + np.matmul(np.asarray(a), b, dtype=acc.dtype), thread, logging_info=log
    )
    return token


def _interpret_wgmma(self, eqn, token, get_invals):
    if isinstance(eqn.invars[1].aval, state.AbstractRef):
        return _from_shared_memory(self, eqn, token, get_invals)
    acc, a, b, *leaves = get_invals()
    empty = jax.tree.structure([])
    trees = [eqn.params[f"{name}_transforms_tree"] or empty for name in ("acc", "a", "b")]
    acc_transforms, _, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(tuple(trees)), leaves)
    acc, acc_transforms = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
    b, b_transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_transforms)
    token = callback.io_callback(
        functools.partial(_product, source_info=eqn.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc_key=acc,
        acc_transforms=acc_transforms,
        a=a,
        b_key=b,
        b_transforms=b_transforms,
    )
    return token, []


_interpreter._interpret_wgmma_ref_p = _interpret_wgmma

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def races_found() -> bool:
    """Whether the last interpreted kernel had a race."""
    return interpret_pallas_call.get_races().races_found
