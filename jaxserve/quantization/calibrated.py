"""A source of parameters quantized with calibration text, layer by layer: one layer's weights and the text's hidden
states are in memory, whatever the number of layers; the embedding only while the text is looked up."""

import dataclasses
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.dequantize import dequantize
from jaxserve.config import ModelConfig
from jaxserve.model.layers import layer_kind
from jaxserve.model.params import layer_specs, named_leaves, param_specs
from jaxserve.quantization.activations import check_calibratable, layer_forward, layer_moments
from jaxserve.quantization.awq import scaled_layer
from jaxserve.quantization.checkpoint import Read
from jaxserve.quantization.gptq import gptq
from jaxserve.quantization.rounding import check_finite, pack


class CalibratedSource:
    """A ``ParamSource`` of ``config``'s parameters, quantized by its method, over ``read`` of the plain ones.

    Layers are made in order, each on the hidden states that the quantized ones before it give; going back starts over.
    AWQ only scales columns: they are rounded as GPTQ's then, but in their own order, as its layout has no other.

    Args:
        sequences: token ids, each sequence read from its start.

    Raises:
        CheckpointError: the method cannot follow the architecture; when reading, a value that is not finite.
    """

    def __init__(self, read: Read, config: ModelConfig, sequences: list[list[int]]):
        assert config.quantization is not None
        self._method = config.quantization.method
        check_calibratable(config, self._method)
        self._read, self._config, self._sequences = read, config, sequences
        self._formats = config.quantization.formats()
        self._plain = dataclasses.replace(config, quantization=None)
        self._states: list[Any] = []  # [T, D] of each sequence, before layer ``_next``
        self._next = 0
        self._leaves: dict[str, np.ndarray] = {}  # of layer ``_next - 1``
        self._lock = threading.Lock()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """See ``ParamSource``. The first read of a layer quantizes it, and those before it that have not been."""
        if not name.startswith("layers."):
            return self._read(name, index)
        layer = int(name.split(".")[1])
        with self._lock:
            if layer < self._next - 1 or self._next == 0:
                self._begin()
            while self._next <= layer:
                self._advance()
            return self._leaves[name][index]

    def _begin(self) -> None:
        config = self._plain
        specs = dict(named_leaves(param_specs(config)))
        embed = self._read("embed", _whole(specs["embed"].shape)).astype(np.float32)
        positions = None
        if config.learned_positions:
            positions = self._read("positions", _whole(specs["positions"].shape)).astype(np.float32)
        self._states = []
        for ids in self._sequences:
            x = embed[ids] * np.float32(config.embed_scale)
            self._states.append(x if positions is None else x + positions[: len(ids)])
        self._next = 0

    def _advance(self) -> None:
        layer, prefix = self._next, f"layers.{self._next}."
        specs = layer_specs(self._plain, layer)
        p: dict[str, Any] = {}
        stored: dict[str, tuple[Any, np.ndarray]] = {}  # as f32, and as the source has it
        for field in (f.name for f in dataclasses.fields(specs)):
            if (spec := getattr(specs, field)) is not None:
                given = self._read(prefix + field, _whole(spec.shape))
                p[field] = given.astype(np.float32)
                stored[field] = p[field], given
                check_finite(prefix + field, p[field])
        moments = layer_moments(p, self._states, config=self._plain, layer=layer)
        groups = {field: self._formats[prefix + field].group_size or p[field].shape[-1] for field in moments}
        scales: dict[str, np.ndarray] = {}
        if self._method == "awq":
            dtypes = {field: given.dtype for field, (_, given) in stored.items()}
            p, scales = scaled_layer(p, moments, groups, self._plain, dtypes)
        leaves: dict[str, np.ndarray] = {}
        for field, values in p.items():
            form, name = self._formats.get(prefix + field), prefix + field
            if form is None:
                given = stored[field][1]
                leaves[name] = given if values is stored[field][0] else values.astype(given.dtype)
                p[field] = leaves[name].astype(np.float32)
                continue
            second = moments[field].second
            if (s := scales.get(field)) is not None:  # its inputs are scaled down
                second = second / np.outer(s, s)
            matrix, rows = values.reshape(-1, values.shape[-1]), values.shape[:-1]
            found = gptq(name, matrix, second, groups[field], has_bias=form.has_bias, act_order=form.has_perm)
            parts = {"q": pack(found.q).reshape(*rows, -1), "scale": found.scale.reshape(*rows, -1)}
            if form.has_perm:
                parts["perm"] = found.perm
            if form.has_bias:
                parts["bias"] = (-found.zero * found.scale).reshape(*rows, -1)
            leaves |= {f"{name}.{part}": array for part, array in parts.items()}
            p[field] = dequantize(form, parts["q"], parts["scale"], parts.get("bias"), parts.get("perm"))
        kind = layer_kind(self._plain, layer)
        p = {field: jnp.asarray(values) for field, values in p.items()}
        self._states = [np.asarray(layer_forward(p, x, config=self._plain, kind=kind)[0]) for x in self._states]
        self._leaves, self._next = leaves, layer + 1


def _whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)
