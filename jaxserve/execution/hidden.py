"""What is asked of a step's hidden states besides sampling: log-probabilities of given tokens, and pooled vectors.

The step leaves the last layer's output of its tokens in ``DeviceState.hidden``. Two programs of fixed shapes read it
before the next step writes it: whatever the bucket, and only for requests that ask.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.config import ModelConfig
from jaxserve.execution import sampling
from jaxserve.execution.step import StageParams, pack_outputs
from jaxserve.model import decoder, layers
from jaxserve.parallel import specs

SCORE_ROWS = 64  # C: tokens that one call scores; [C, V] f32 is its workspace, and reading the head its cost


@flax.struct.dataclass
class HeadParams:
    """What comes after the last layer."""

    final_norm: Any  # [D]
    final_norm_bias: Any  # [D]; None for RMS
    head: Any  # [V, D]


def head_params(params: StageParams) -> HeadParams:
    """Of a tree of arrays, or of what stands for them."""
    return HeadParams(params.final_norm, params.final_norm_bias, params.embed if params.head is None else params.head)


def make_scorer(
    config: ModelConfig, mesh: Mesh, max_logprobs: int, params_specs: HeadParams
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``scorer(params, hidden [ST, TH, D], fields [2, C] i32) -> (packed [C, 2 + 2 * KL] i32, logprobs [C, V] f32)``.

    ``fields`` are the places of tokens in the step and the ids that follow them. ``packed`` is for
    ``step_io.unpack_outputs``: log-probabilities of those ids and the best; ``logprobs`` are all, to be copied on
    demand only. ``params_specs`` are the PartitionSpecs of ``params``.
    """

    def scorer(params: HeadParams, hidden: jax.Array, fields: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = decoder.from_last_stage(hidden[0].at[fields[0]].get(mode="clip"))  # [C, D]
        x = layers.norm(x, params.final_norm, params.final_norm_bias, config)
        logits = decoder.gathered(decoder.logits(params.head, x, config), config)  # [C, V] f32
        chosen, top_ids, top = sampling.top_logprobs(logits, fields[1], jnp.ones_like(fields[1]), max_logprobs)
        return pack_outputs(fields[1], chosen, top_ids, top), jax.nn.log_softmax(logits, axis=1)

    in_specs = (params_specs, specs.HIDDEN, P())
    return jax.shard_map(scorer, mesh=mesh, in_specs=in_specs, out_specs=(P(), P()), check_vma=False)


def make_pooler(config: ModelConfig, mesh: Mesh, num_rows: int, params_specs: HeadParams) -> Callable[..., jax.Array]:
    """``pooler(params, hidden [ST, TH, D], rows [TH] i32) -> sums [R, D] f32``: of the final norm's outputs of the
    tokens that ``rows`` gives to each; R: to none."""

    def pooler(params: HeadParams, hidden: jax.Array, rows: jax.Array) -> jax.Array:
        x = layers.norm(hidden[0], params.final_norm, params.final_norm_bias, config)
        sums = jnp.zeros((num_rows, x.shape[1]), jnp.float32).at[rows].add(x.astype(jnp.float32), mode="drop")
        return decoder.from_last_stage(sums)

    in_specs = (params_specs, specs.HIDDEN, P())
    return jax.shard_map(pooler, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)


def score_workspace_bytes(vocab_size: int) -> int:
    """Memory that a call of the scorer may take: logits, their logarithms, and what finding the best needs."""
    return 4 * SCORE_ROWS * vocab_size * 4
