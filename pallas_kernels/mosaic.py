"""Mosaic GPU, as the kernels use it: imported when a kernel is first traced. That takes a second and more, which a
process that runs on something else, or that only compares shapes, need not spend.

Much of it has no types that a checker can follow, so these are ``Any``.
"""

import importlib
from typing import Any


class _Module:
    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


pl: Any = _Module("jax.experimental.pallas")
plgpu: Any = _Module("jax.experimental.pallas.mosaic_gpu")
mosaic: Any = _Module("jax.experimental.mosaic.gpu")
fragmented_array: Any = _Module("jax.experimental.mosaic.gpu.fragmented_array")
ir: Any = _Module("jax.extend.mlir.ir")
arith: Any = _Module("jax.extend.mlir.dialects.arith")
memref: Any = _Module("jax.extend.mlir.dialects.memref")
vector: Any = _Module("jax.extend.mlir.dialects.vector")
