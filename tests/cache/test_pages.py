"""Pages on the device: what is written can be read, by how much less room a cache of few bits takes."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.cache import pages
from jaxserve.config import CacheConfig, MLAConfig, ParallelConfig
from jaxserve.engine import plan
from jaxserve.parallel.mesh import make_mesh
from pallas_kernels import dispatch
from tests import tiny

NP, K, PS, H = 6, 2, 4, 16


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("dtype, most", [("auto", 0.0), ("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_what_is_written_is_read(dtype, most, num_tokens):
    """``most``: of the error, as a share of the vector's largest element (int8) or of the element (fp8)."""
    r = np.random.default_rng(0)
    kv = r.standard_normal((num_tokens, K, 2, H)).astype(np.float32) * np.exp(3 * r.standard_normal((1, K, 2, 1)))
    kv = kv.astype(np.float32)
    kv[0, 1] = 0
    empty = pages.kv_pages_of((NP, K, 2, PS, H), jnp.dtype("float32"), CacheConfig(num_pages=NP, dtype=dtype), jnp.ones)
    where = r.permutation(NP * PS)[:num_tokens]
    where[-1] = NP * PS if num_tokens > 1 else where[-1]  # padding
    values, scale = pages.values_and_scales(jax.jit(pages.append)(empty, kv, jnp.asarray(where)))
    values = np.asarray(values)
    values = values.view(jnp.float8_e4m3fn) if dtype == "fp8" else values
    got = values.astype(np.float32) * (1 if scale is None else np.asarray(scale, np.float32)[..., None])
    tokens = got.transpose(0, 3, 1, 2, 4).reshape(NP * PS, K, 2, H)
    size = np.abs(kv) if dtype == "fp8" else np.abs(kv).max(-1, keepdims=True)
    for i, place in enumerate(where):
        if place < NP * PS:
            error = np.abs(tokens[place] - kv[i])
            # A bf16 scale that was rounded down cuts the largest element, by 1 in 2**9 at most.
            assert (
                error <= 1.001 * most * size[i] + (np.abs(kv[i]).max(-1, keepdims=True) * 2.0**-9)
            ).all() or not most
            assert most or (error == 0).all()
    others = np.setdiff1d(np.arange(NP * PS), where)
    assert (tokens[others] == (2.0**-9 if dtype == "fp8" else 1)).all()  # the byte 1 is the least e4m3


def test_a_cache_of_few_bits_holds_twice_the_tokens():
    config = dataclasses.replace(tiny.CONFIG, head_dim=128, num_layers=2)
    mesh = make_mesh(ParallelConfig())
    scheduler = plan.scheduler_config(config, mesh, max_model_len=256, max_num_seqs=4096, prefill_sizes=(8192,))

    def tokens(dtype, fraction: float, replicas: int = 1) -> int:
        bf16, meshes = jnp.dtype("bfloat16"), [mesh] * replicas
        params: Any = None  # nothing of a CPU's memory
        found = plan.num_pages_that_fit(
            config, scheduler, params, meshes, bf16, 16, fraction, ("any",), cache_dtype=dtype
        )
        return found * 16

    plain = tokens("auto", 0.01)
    assert plain < 4096 * 256  # no other limit
    assert 1.95 < plain / tokens("auto", 0.01, replicas=2) < 2.05  # of the machine's memory each has its share
    for dtype in ("int8", "fp8"):
        assert 1.95 < tokens(dtype, 0.01) / plain < 2
    # A scale of two bytes for each head's key and value, of one for MLA's latent.
    assert pages.page_bytes(config, 16, jnp.dtype("bfloat16"), ParallelConfig(), "fp8") == 16 * 2 * 2 * 4 * (128 + 2)
    mla = MLAConfig(q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    latent = dataclasses.replace(tiny.CONFIG, mla=mla)
    assert pages.page_bytes(latent, 1, jnp.dtype("bfloat16"), ParallelConfig(), "int8") == 4 * (36 + 2)


def test_what_is_no_dtype_of_a_cache_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="kv_cache_dtype='fp4' is not one of auto, int8, fp8"):
        tiny.engine(kv_cache_dtype="fp4")
    hopper, ampere = (SimpleNamespace(platform="gpu", compute_capability=x) for x in ("9.0", "8.0"))
    for checked, device, taken in (
        (frozenset({"kv int8"}), hopper, ("auto", "int8")),
        (frozenset({"kv int8"}), ampere, ("auto",)),
        (frozenset(), hopper, ("auto",)),
    ):
        monkeypatch.setattr(dispatch, "MOSAIC_GPU_CHECKED", checked)
        gpu: Any = SimpleNamespace(devices=np.array([device]))
        for dtype in ("auto", "int8", "fp8"):
            if dtype in taken:
                plan.check_cache_dtype(dtype, gpu)
                continue
            with pytest.raises(ValueError, match=f"kv_cache_dtype='{dtype}': paged attention has no kernel for it"):
                plan.check_cache_dtype(dtype, gpu)
