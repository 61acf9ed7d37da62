"""Quantized matrices of every kind in one model, served on a mesh, against the oracle; and what cannot be."""

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxserve import Engine, SamplingParams
from jaxserve.config import MatrixFormat, ParallelConfig, QuantizationConfig, QuantizedMatrices
from jaxserve.execution import placement
from jaxserve.execution.dummy import dummy_params
from jaxserve.execution.placement import place_params
from jaxserve.model import quantized
from jaxserve.model.array_spec import ArraySpec
from jaxserve.model.params import TreeSource, init_params, named_leaves, num_params, param_specs
from jaxserve.parallel.mesh import make_mesh
from pallas_kernels import dispatch, int4_matmul
from tests import tiny
from tests.oracle import oracle_greedy
from tests.quantization.round_to_nearest import quantize, quantized_model

FORMATS = {
    "embed": MatrixFormat(kind="int8", group_size=16),
    "head": MatrixFormat(kind="int4", group_size=8),
    "qkv": MatrixFormat(kind="int4", group_size=8, has_bias=True),
    "attn_out": MatrixFormat(kind="int4", group_size=16, has_perm=True),
    "gate_up": MatrixFormat(kind="int8", has_perm=True),
    "down": MatrixFormat(kind="fp8", group_size=8),
}


@cache
def model():
    return quantized_model(tiny.CONFIG, tiny.params(), FORMATS)


def engine(config, params, **options) -> Engine:
    sizes = {"max_model_len": 32, "max_num_seqs": 1, "num_pages": 8, "page_size": 4, "prefill_sizes": (8,)}
    return Engine.from_params(config, params, max_prefill_rows=1, samplings=("greedy",), **(sizes | options))


def test_tokens_on_a_mesh_are_those_of_the_dequantized_model():
    config, params, plain = model()
    prompt = tiny.prompts(1, seed=5, longest=12)[0]
    with engine(config, params, mesh="stage=2,tensor=2") as served:
        (completion,) = served.generate([prompt], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
        assert served.stats().recompilations_after_ready == 0
    assert completion.token_ids == oracle_greedy(tiny.CONFIG, plain, prompt, 16)


def test_the_tree_has_a_quantized_models_arrays():
    config, params, _ = model()
    leaves = {name: (tuple(x.shape), str(x.dtype)) for name, x in named_leaves(params)}
    specs = {name: (x.shape, x.dtype or "float32") for name, x in named_leaves(param_specs(config))}
    assert leaves == specs
    assert leaves["layers.2.qkv.q"] == ((4, 4, 8, 16), "uint8")
    assert leaves["layers.2.qkv.bias"] == ((4, 4, 8, 4), "float32")
    assert leaves["layers.0.gate_up.scale"] == ((2, 48, 1), "float32")
    assert leaves["layers.0.attn_out.perm"] == ((64,), "int32")
    assert num_params(config) == num_params(tiny.CONFIG)
    drawn = named_leaves(jax.eval_shape(partial(init_params, config), jax.random.key(0)))
    drawn = {name: (x.shape, str(x.dtype)) for name, x in drawn}
    assert drawn == specs


def in_mesh(tensor: int, function, *specs):
    """``function`` under ``shard_map`` over ``tensor`` devices, its result whole on each."""
    mesh = make_mesh(ParallelConfig(tensor=tensor))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))


@pytest.mark.parametrize(
    "form",
    [
        MatrixFormat(kind="int8", activations="int8"),
        MatrixFormat(kind="fp8", group_size=16, activations="fp8", activation_group=16),
        MatrixFormat(kind="fp8", activations="fp8", has_perm=True),
        MatrixFormat(kind="int4", group_size=32, has_bias=True, has_perm=True),
    ],
    ids=lambda f: f"{f.kind} {f.activations} {'perm' if f.has_perm else ''}",
)
def test_a_product_whose_input_is_split_is_the_same(form):
    r = np.random.default_rng(0)
    spec = quantized.quantized_specs("layers.0.down", ArraySpec((24, 64), (None, "ffn")), form)
    matrix, plain = quantize(r.standard_normal((24, 64)).astype(np.float32), spec)
    x = r.standard_normal((5, 64)).astype(np.float32)
    columns = P(None, "tensor")
    scale = P() if form.group_size is None else columns
    specs = dataclasses.replace(matrix, q=columns, scale=scale, bias=None if matrix.bias is None else scale,
                           perm=None if matrix.perm is None else P("tensor"))  # fmt: skip

    def product(x, w):
        return jax.lax.psum(quantized.matmul(x, w, jnp.float32), "tensor")

    whole = in_mesh(1, product, columns, specs)(x, matrix)
    np.testing.assert_allclose(in_mesh(2, product, columns, specs)(x, matrix), whole, rtol=1e-5, atol=1e-5)
    error = np.abs(whole - x @ plain.T).max() / np.abs(x @ plain.T).max()
    assert error < {"none": 1e-5, "int8": 0.02, "fp8": 0.05}[form.activations]
    assert (error > 1e-4) == (form.activations != "none")  # rounded, where it says so


def test_experts_are_put_together_for_their_rows():
    r = np.random.default_rng(1)
    w = r.standard_normal((3, 10, 32)).astype(np.float32)
    x, sizes = r.standard_normal((7, 32)).astype(np.float32), np.array([2, 0, 5], np.int32)
    spec = quantized.quantized_specs(
        "layers.0.experts_down",
        ArraySpec((3, 10, 32), (None, None, "ffn")),
        MatrixFormat(kind="int4", group_size=8, has_perm=True),
    )
    each = [quantize(w[e], dataclasses.replace(spec, perm=ArraySpec((32,), (None,))), seed=e) for e in range(3)]
    matrix = jax.tree.map(lambda *leaves: np.stack(leaves), *(pair[0] for pair in each))
    plain = np.stack([pair[1] for pair in each])
    want = np.einsum("md,mfd->mf", x, plain[np.repeat(np.arange(3), sizes)])
    for implementation in ("reference", "xla"):
        got = in_mesh(1, partial(quantized.experts_matmul, implementation=implementation), P(), P(), P())
        np.testing.assert_allclose(got(x, matrix, sizes), want, atol=2e-5)


def test_a_kernels_own_layout_is_made_on_the_devices(monkeypatch):
    """A kernel that keeps the low nibbles of all columns, then the high ones, in two arrays."""

    def prepare(w, whole_zeros):
        assert whole_zeros
        return {"low": w.q & 15, "high": w.q >> 4, "per_group": jnp.stack([w.scale, w.bias])}

    def multiply(x, w, out_dtype):
        scale, bias = w["per_group"]
        return int4_matmul.reference.int4_matmul(x, w["low"] + 16 * w["high"], scale, bias).astype(out_dtype)

    monkeypatch.setitem(int4_matmul._IMPLEMENTATIONS, "mosaic_gpu", multiply)
    monkeypatch.setitem(int4_matmul.PREPARE, "mosaic_gpu", prepare)
    monkeypatch.setattr(placement, "_hopper_kernel", lambda matrix, dtype: "int4_matmul")
    monkeypatch.setattr(
        dispatch, "best_quantized_matmul", lambda device, hopper: "mosaic_gpu" if hopper else "reference"
    )
    biased = MatrixFormat(kind="int4", group_size=8, has_bias=True, has_whole_zeros=True)
    config, params, plain = quantized_model(
        tiny.CONFIG, tiny.params(), {"qkv": biased, "down": biased, "embed": biased, "head": biased}
    )
    prompt = tiny.prompts(1, seed=6, longest=7)[0]
    with engine(config, params, mesh="stage=2,tensor=2") as served:
        (completion,) = served.generate([prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        names = {name for name, _ in named_leaves(served.loop.runner._params)}
    assert {"layers.0.qkv.prepared.low", "layers.1.down.prepared.per_group", "head.prepared.high"} <= names
    assert {"embed.q", "layers.0.gate_up"} <= names and "layers.0.qkv.q" not in names
    assert completion.token_ids == oracle_greedy(tiny.CONFIG, plain, prompt, 6)


def with_formats(*matrices: tuple[MatrixFormat, tuple[str, ...]]):
    found = tuple(QuantizedMatrices(format=form, parameters=names) for form, names in matrices)
    return dataclasses.replace(tiny.CONFIG, quantization=QuantizationConfig(method="test", matrices=found))


@pytest.mark.parametrize(
    "form, name, tensor, stage, message",
    [
        (MatrixFormat(kind="int4", group_size=10), "layers.1.down", 1, 1,
         "params.layers.1.down: group_size=10 does not divide its 48 input columns"),
        (MatrixFormat(kind="int4", group_size=48), "layers.1.down", 2, 1,
         "params.layers.1.down: tensor=2 gives each device 24 of its 48 input columns, which are quantized in groups "
         "of 48"),
        (MatrixFormat(kind="fp8", activation_group=48, activations="fp8"), "layers.1.down", 2, 1,
         "of its 48 input columns, of which 48 are rounded together"),
        (MatrixFormat(kind="int8"), "layers.1.attn_norm", 1, 1, "params.layers.1.attn_norm cannot be quantized, only "),
        (MatrixFormat(kind="int8"), "layers.1.down", 1, 2,
         "stage=2 puts params.layers.3.down where another stage has layer 1's, which is quantized otherwise: None and"),
    ],
)  # fmt: skip
def test_what_a_mesh_cannot_split_is_refused_with_both_numbers(form, name, tensor, stage, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config = with_formats((form, (name,)))
        mesh = make_mesh(ParallelConfig(stage=stage, tensor=tensor))
        params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        place_params(TreeSource(params, config), config, config, mesh, jnp.dtype("float32"))


def test_formats_that_cannot_be():
    with pytest.raises(ValueError, match=r"MatrixFormat\.group_size=7 must be even and positive"):
        MatrixFormat(kind="int4", group_size=7)
    with pytest.raises(ValueError, match=r"QuantizationConfig gives layers\.0\.qkv two formats"):
        with_formats((FORMATS["qkv"], ("layers.0.qkv",)), (FORMATS["down"], ("layers.0.qkv",)))
    config, params, _ = model()
    lacking = dataclasses.replace(params, embed=dataclasses.replace(params.embed, scale=params.embed.scale[:, :1]))
    with pytest.raises(ValueError, match=re.escape("params.embed.scale has shape (259, 1), expected (259, 2)")):
        engine(config, lacking)
    assert placement.is_layer("layers.0.qkv.q")


@pytest.mark.parametrize(
    "form, dtype, want",
    [
        (MatrixFormat(kind="int4", group_size=128), "bfloat16", "int4_matmul"),
        (MatrixFormat(kind="int4", group_size=128), "float32", None),
        (MatrixFormat(kind="int4", group_size=16), "bfloat16", None),
        (MatrixFormat(kind="int8"), "bfloat16", "int8_matmul"),
        (MatrixFormat(kind="int8", group_size=32), "bfloat16", None),
        (MatrixFormat(kind="int8", activations="int8"), "bfloat16", None),
        (MatrixFormat(kind="fp8"), "bfloat16", None),
    ],
)
def test_the_kernels_for_hopper_are_chosen_for_what_they_take(form, dtype, want):
    class Hopper:
        platform, compute_capability = "gpu", "9.0"

    spec = quantized.quantized_specs("layers.0.down", ArraySpec((256, 256), (None, "ffn")), form)
    matrix = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype or dtype), spec, is_leaf=lambda x: isinstance(x, ArraySpec)
    )
    kernel = placement._hopper_kernel(matrix, jnp.dtype(dtype))
    assert kernel == want
    checked = want in dispatch.MOSAIC_GPU_CHECKED
    assert dispatch.best_quantized_matmul(Hopper(), hopper=kernel) == ("mosaic_gpu" if checked else "xla")
    assert dispatch.best_quantized_matmul(jax.devices()[0], hopper=kernel) == "reference"


def test_dummy_parameters_lie_as_placed_ones():
    small = {"embed": FORMATS["embed"], "attn_out": FORMATS["attn_out"], "qkv": FORMATS["qkv"]}
    config, params, _ = quantized_model(tiny.CONFIG, tiny.params(), small)
    mesh = make_mesh(ParallelConfig(stage=2, tensor=2))
    dummy = dict(named_leaves(dummy_params(config, mesh, jnp.dtype("float32"))))
    placed = dict(named_leaves(place_params(TreeSource(params, config), config, config, mesh, jnp.dtype("float32"))))
    facts = [{name: (x.shape, x.dtype, x.sharding) for name, x in leaves.items()} for leaves in (dummy, placed)]
    assert facts[0] == facts[1]
    assert len(np.unique(np.asarray(dummy["layers.0.qkv.q"]))) > 100
    np.testing.assert_array_equal(np.sort(np.asarray(dummy["layers.0.attn_out.perm"])[1]), np.arange(64))
