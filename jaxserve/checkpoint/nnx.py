"""A flax ``nnx`` state as parameters, through a table of names: from a trainer into an engine without a file.

A table says of each of our parameters which of the state's arrays hold it, and which of its axes lie where
(``hf.layout`` has the notation). A ``nnx.Linear`` keeps its kernel ``[in, out]``, so a down projection is
``Source("blocks.{i}.mlp.down.kernel", "f d")``; separate q, k and v of a module that keeps heads apart are

    "qkv": (
        Source("blocks.{i}.attn.q.kernel", "d (k s) h", {"s": QUERIES}),
        Source("blocks.{i}.attn.k.kernel", "d k h", {"s": KEYS}),
        Source("blocks.{i}.attn.v.kernel", "d k h", {"s": VALUES}),
    )
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxserve.checkpoint.hf.layout import Piece, Recipe, Source, pieces, read_box
from jaxserve.config import ModelConfig
from jaxserve.model.params import named_leaves, param_specs

__all__ = ["GATE", "KEYS", "QUERIES", "UP", "VALUES", "NnxSource", "Source", "params_from_nnx"]

QUERIES, KEYS, VALUES = slice(None, -2), slice(-2, -1), slice(-1, None)  # of a group's heads: axis s of qkv
GATE, UP = slice(0, 1), slice(1, 2)  # axis u of gate_up


class NnxSource:
    """The parameters of ``config`` in a state: a ``model.params.ParamSource`` over its live arrays.

    The arrays are those of the state when this was made. ``read`` brings an array to the host to take its part.
    """

    def __init__(self, arrays: Mapping[str, Any], config: ModelConfig, names: Mapping[str, Recipe]):
        self.config = config
        self._arrays = arrays
        self._names = names
        self._shapes = {name: spec.shape for name, spec in named_leaves(param_specs(config))}
        used = set[str]()
        for name in self._shapes:
            for piece in self._pieces(name):
                if piece.tensor not in arrays:
                    raise ValueError(f"params.{name}: the state has no {piece.tensor!r}, expected shape {piece.shape}")
                if tuple(arrays[piece.tensor].shape) != piece.shape:
                    raise ValueError(
                        f"params.{name}: {piece.tensor!r} has shape {tuple(arrays[piece.tensor].shape)}, "
                        f"expected {piece.shape}"
                    )
                used.add(piece.tensor)
        for path in arrays:
            if path not in used:
                raise ValueError(
                    f"the state's {path!r} of shape {tuple(arrays[path].shape)} is in no name of the table"
                )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part ``index`` of parameter ``name``, in the state's dtype where its arrays agree, else in float32."""
        selected = {piece.tensor for piece in self._pieces(name)}
        arrays = {path: np.asarray(self._arrays[path]) for path in selected}
        found = read_box(self._pieces(name), arrays, index)
        dtypes = {part.dtype for _, part in found}
        out = np.empty([s.stop - s.start for s in index], dtypes.pop() if len(dtypes) == 1 else np.float32)
        for where, part in found:
            out[where] = part
        return out

    def _pieces(self, name: str) -> Iterator[Piece]:
        *parents, parameter = name.split(".")
        if parameter not in self._names:
            raise ValueError(f"params.{name} of shape {self._shapes[name]} has no name in the table")
        around = {p: s for n, s in self._shapes.items() if (p := n.rpartition(".")[2]) and n == ".".join([*parents, p])}
        return pieces(parameter, around, self._names[parameter], "", int(parents[1]) if parents else None)


def params_from_nnx(state: Any, config: ModelConfig, names: Mapping[str, Recipe]) -> NnxSource:
    """What ``Engine.from_params`` and ``Engine.update_params`` take, from a flax ``nnx`` state.

    Args:
        state: of the parameters alone, ``nnx.state(model, nnx.Param)``; or such a module itself.
        names: field of ``model.params.Params`` or ``LayerParams`` -> where its parts are. Paths are the state's keys
            with dots between them; ``{i}`` is the layer, ``{e}`` an expert.

    Raises:
        ValueError: names the parameter that the table or the state lacks, the array of another shape (with both), or
            the array that no name takes.
    """
    if isinstance(state, nnx.Module):
        state = nnx.state(state, nnx.Param)
    arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]:
        arrays[".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)] = leaf
    return NnxSource(arrays, config, names)
