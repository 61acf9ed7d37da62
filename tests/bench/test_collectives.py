"""What devices send, counted in compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxserve.bench.collectives import sent_bytes, textbook_bubble
from jaxserve.config import ParallelConfig
from jaxserve.parallel.mesh import make_mesh


def compiled(function, stage: int, tensor: int) -> str:
    mesh = make_mesh(ParallelConfig(stage=stage, tensor=tensor))
    shared = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(shared).lower(jnp.zeros((3, 5), jnp.float32)).compile().as_text() or ""


@pytest.mark.parametrize("stage, tensor", [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_each_collective_is_counted_on_its_axis(stage: int, tensor: int):
    size = 3 * 5 * 4

    def on_tensor(x):
        return lax.psum(x, "tensor")

    def on_stage(x):
        return lax.ppermute(x, "stage", [(s, s + 1) for s in range(stage - 1)])

    def gathered(x):
        return lax.all_gather(x, "tensor", axis=0, tiled=True)

    summed = sent_bytes([compiled(on_tensor, stage, tensor)], tensor)
    assert summed == (0, stage * 2 * size * (tensor - 1))
    if stage > 1:
        assert sent_bytes([compiled(on_stage, stage, tensor)], tensor) == (tensor * size * (stage - 1), 0)
        both = sent_bytes([compiled(lambda x: lax.psum(x, "stage"), stage, tensor)] * 2, tensor)
        assert both == (2 * tensor * 2 * size * (stage - 1), 0)
    # Of a sum over both axes each neighbour in the ring counts for itself: the next stage is one of ``tensor``.
    everywhere = sent_bytes([compiled(lambda x: lax.psum(x, ("stage", "tensor")), stage, tensor)], tensor)
    total, between_stages = 2 * size * (stage * tensor - 1), 1 / tensor if stage > 1 else 0
    assert everywhere == pytest.approx((total * between_stages, total * (1 - between_stages)))
    # Each device sends its part to all others.
    assert sent_bytes([compiled(gathered, stage, tensor)], tensor) == (0, stage * size * tensor * (tensor - 1))


def test_as_other_platforms_write_them():
    text = """
  %all-reduce-start.1 = bf16[4,8]{1,0} all-reduce-start(%a), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), x=y
  %all-reduce-done.1 = bf16[4,8]{1,0} all-reduce-done(%all-reduce-start.1)
  %all-gather-start = (f32[1,8]{1,0}, f32[2,8]{1,0}) all-gather-start(%b), replica_groups=[2,2]<=[4], dimensions={0}
  %collective-permute-start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%c), \
channel_id=2, source_target_pairs={{0,2},{1,3}}
"""
    assert sent_bytes([text], tensor=2) == (2 * 2 * 64 + 2 * 16, 2 * 64)


def test_the_textbook():
    assert (textbook_bubble(4, 1), textbook_bubble(1, 1)) == (0.75, 0)
    assert textbook_bubble(4, 4) == pytest.approx(3 / 7)
