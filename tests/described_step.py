"""A step of a real model's shapes, lowered for devices that are described instead of present."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.checkpoint.shapes import read_shape
from jaxserve.config import CacheConfig, CacheDtype, LoraConfig
from jaxserve.execution.adapters import adapters_shape
from jaxserve.execution.lowering import lower_step, state_shape
from jaxserve.execution.placement import stage_param_formats
from jaxserve.execution.step import DeviceState, stage_param_shapes
from jaxserve.model.params import named_leaves
from jaxserve.parallel.placed import placed_config
from jaxserve.step_io import Bucket, StepDims

MODEL = "llama-3.1-8b"
NUM_LAYERS = 2  # of a stage: layers are unrolled and all alike, two show what happens inside one and between two
NUM_PAGES, PAGE_SIZE, MAX_MODEL_LEN, NUM_SLOTS = 4096, 16, 4096, 256
CHUNK_TOKENS = 512  # of a prompt


class DescribedStep(NamedTuple):
    lowered: jax.stages.Lowered
    params: dict[str, jax.ShapeDtypeStruct]  # by name, with their shardings
    state: DeviceState  # of shapes


def described_step(
    mesh: Mesh, bucket: Bucket, *, max_loras: int = 0, cache_dtype: CacheDtype = "auto"
) -> DescribedStep:
    """The step of ``bucket`` of ``MODEL`` with ``NUM_LAYERS`` layers a stage, in bfloat16, for ``mesh``."""
    stages, tensor = mesh.shape["stage"], mesh.shape["tensor"]
    config = replace(read_shape(MODEL), num_layers=NUM_LAYERS * stages)
    config = placed_config(config, tensor, MAX_MODEL_LEN)
    formats = stage_param_formats(config, mesh)
    shapes = named_leaves(stage_param_shapes(config, stages, tensor))
    leaves = {
        name: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=placed)
        for (name, spec), (_, placed) in zip(shapes, named_leaves(formats), strict=True)
    }
    params: Any = jax.tree.unflatten(jax.tree.structure(formats), list(leaves.values()))
    dims = StepDims(
        num_slots=NUM_SLOTS,
        max_pages_per_seq=MAX_MODEL_LEN // PAGE_SIZE,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        max_loras=max_loras,
        hidden_tokens=CHUNK_TOKENS + 128,  # kept for scores and embeddings; no matrix has as many rows
    )
    cache = CacheConfig(num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=cache_dtype)
    dtype = jnp.dtype("bfloat16")
    state = state_shape(config, cache, dims, [bucket], mesh, dtype)
    adapters = adapters_shape(config, LoraConfig(max_loras=max_loras), mesh, dtype) if max_loras else None
    return DescribedStep(lower_step(config, params, state, dims, bucket, mesh, adapters), leaves, state)
