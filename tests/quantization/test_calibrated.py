"""GPTQ and AWQ against rounding to nearest, on matrices and on a whole model whose inputs are uneven."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError
from jaxserve.model.layers import layer_kind, norm
from jaxserve.model.params import TreeSource, named_leaves, param_specs
from jaxserve.quantization.activations import Moments, layer_forward, layer_moments
from jaxserve.quantization.awq import best_scale, rounded, scaled_layer
from jaxserve.quantization.calibrated import CalibratedSource
from jaxserve.quantization.clipping import best_grid, on_grid
from jaxserve.quantization.convert import quantize
from jaxserve.quantization.gptq import gptq
from jaxserve.quantization.recipe import quantized_config
from tests import tiny
from tests.oracle import oracle_logits
from tests.quantization.test_rounding import live, plain_params


def problem(rows: int = 24, columns: int = 64, tokens: int = 256):
    """A matrix and inputs that are correlated and of very different sizes."""
    r = np.random.default_rng(0)
    w = r.standard_normal((rows, columns)).astype(np.float32)
    x = r.standard_normal((tokens, 12)) @ r.standard_normal((12, columns)) + 0.3 * r.standard_normal((tokens, columns))
    x = (x * np.exp(r.standard_normal(columns))).astype(np.float32)
    return w, x, Moments(jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).sum(0)))


def dequantized(found) -> np.ndarray:
    numbers = found.q.reshape(*found.scale.shape, -1)
    values = ((numbers - found.zero[..., None]) * found.scale[..., None]).reshape(found.q.shape)
    return values[:, np.argsort(found.perm)]


def output_error(w: np.ndarray, approximated: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (approximated - w).T) / np.linalg.norm(x @ w.T))


def squares(error):
    return (error**2).sum(-1)


@pytest.mark.parametrize("act_order", [True, False])
def test_outputs_are_nearer_than_those_of_rounding(act_order):
    w, x, moments = problem()
    nearest = output_error(w, np.asarray(rounded(jnp.asarray(w), 16)), x)
    found = gptq("m", w, moments.second, 16, act_order=act_order)
    assert found.q.max() <= 15 and sorted(found.perm) == list(range(64))
    assert act_order or list(found.perm) == list(range(64))
    assert output_error(w, dequantized(found), x) < 0.6 * nearest
    scale = np.asarray(best_scale(jnp.asarray(w), *moments, group_size=16))
    assert output_error(w, np.asarray(rounded(jnp.asarray(w * scale), 16)) / scale, x) < 0.9 * nearest


def test_gptq_with_inputs_of_one_size_that_are_independent_is_rounding():
    w, _, _ = problem()
    found = gptq("m", w, jnp.eye(64), 16)
    grouped = jnp.asarray(w).reshape(24, -1, 16)
    nearest = on_grid(grouped, *best_grid(grouped, squares, has_bias=True))
    np.testing.assert_allclose(dequantized(found), nearest.reshape(w.shape), atol=1e-5)


def test_a_smaller_range_is_found_where_that_serves_the_inputs_better():
    w, _, _ = problem()
    w[:, ::16] *= 6  # one large weight in each group, whose input is small
    grouped, sizes = jnp.asarray(w).reshape(24, -1, 16), jnp.where(jnp.arange(16) == 0, 1e-3, 1.0)
    scale, zero = best_grid(grouped, lambda error: squares(error * sizes), has_bias=True)
    error = squares((on_grid(grouped, scale, zero) - grouped) * sizes)
    whole = squares((np.asarray(rounded(jnp.asarray(w), 16)).reshape(grouped.shape) - grouped) * sizes)
    assert error.sum() < 0.8 * whole.sum() and (error <= whole).all()
    assert (scale < 0.8 * (grouped.max(-1) - grouped.min(-1)) / 15).any()


def test_weights_of_a_larger_groups_grid_are_found_again():
    """Groups of 64 rounded before, whose extremes most groups of 16 do not have."""
    r = np.random.default_rng(5)
    step = r.uniform(0.01, 0.1, (24, 1)).astype(np.float16).astype(np.float32)
    zero = r.integers(4, 12, (24, 1))
    numbers = np.rint(zero + r.uniform(-4, 4, (24, 64)))
    numbers[:, 0::16], numbers[:, 1::16] = zero - 4, zero + 4  # a group spans 8 steps at the least
    numbers[:, :1], numbers[:, 1:2] = 0, 15
    w = ((numbers - zero) * step).astype(np.float32)
    assert np.abs(np.asarray(rounded(jnp.asarray(w), 16)) - w).max() > 0.2 * step.min()
    found = gptq("m", w, problem()[2].second, 16, act_order=False)
    np.testing.assert_allclose(dequantized(found), w, atol=1e-6)


def test_gptq_where_an_input_is_always_zero_and_where_moments_are_none():
    w, x, _ = problem()
    x[:, 5] = 0
    found = dequantized(gptq("m", w, jnp.asarray(x.T @ x), 16))
    assert np.isfinite(found).all() and output_error(w, found, x) < 0.1
    with pytest.raises(CheckpointError, match=r"parameter m: its inputs' second moments cannot be factorized"):
        gptq("m", w, -jnp.eye(64), 16)


def layer() -> dict:
    specs = tiny.params().layers[1]
    return {
        f.name: np.asarray(getattr(specs, f.name))
        for f in dataclasses.fields(specs)
        if getattr(specs, f.name) is not None
    }


def test_layers_in_a_row_are_the_model():
    ids = np.random.default_rng(6).integers(2, 259, 256).tolist()
    x = jnp.asarray(tiny.params().embed)[jnp.asarray(ids)]
    for i, one in enumerate(tiny.params().layers):
        p = {f.name: np.asarray(v) for f in dataclasses.fields(one) if (v := getattr(one, f.name)) is not None}
        x, inputs = layer_forward(p, x, config=tiny.CONFIG, kind=layer_kind(tiny.CONFIG, i))
    x = norm(jnp.asarray(x), tiny.params().final_norm, None, tiny.CONFIG)
    head = tiny.params().embed if tiny.params().head is None else tiny.params().head
    np.testing.assert_allclose(x @ head.T, oracle_logits(tiny.CONFIG, tiny.params(), ids), atol=1e-4)
    assert {field: array.shape[1] for field, array in inputs.items()} == {
        "qkv": 32, "attn_out": 64, "gate_up": 32, "down": 48
    }  # fmt: skip


def test_a_scaled_layer_computes_the_same():
    p = layer()
    # As long as the sequences of the test below, which then compiles nothing new.
    xs = [np.asarray(jax.random.normal(jax.random.key(i), (256, 32))) * np.linspace(0.1, 5, 32) for i in range(2)]
    config = tiny.CONFIG
    moments = layer_moments(p, xs, config=config, layer=1)
    groups = {"qkv": 16, "attn_out": 16, "gate_up": 16, "down": 16}
    p["mlp_norm"] = p["mlp_norm"].astype(jnp.bfloat16).astype(np.float32)
    stored = {"attn_norm": np.float32, "mlp_norm": jnp.bfloat16}
    scaled, scales = scaled_layer(p, moments, groups, config, stored)
    np.testing.assert_allclose(scaled["down"] / scales["down"], p["down"], atol=1e-5)
    np.testing.assert_array_equal(scaled["mlp_norm"].astype(jnp.bfloat16), scaled["mlp_norm"])
    assert not np.allclose(scaled["attn_norm"], p["attn_norm"]) and not np.allclose(scaled["mlp_norm"], p["mlp_norm"])
    kind = layer_kind(config, 1)
    want, got = (layer_forward(q, xs[0], config=config, kind=kind)[0] for q in (p, scaled))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_models_are_nearer_than_the_rounded_one(tmp_path):
    text = tmp_path / "text"
    text.write_text("".join(map(chr, np.random.default_rng(1).integers(32, 127, 1024))))
    ids = tiny.tokenizer().encode(text.read_text()[:200])
    want = oracle_logits(tiny.CONFIG, tiny.params(), ids)
    errors = {}
    for method in ("int4-rtn", "gptq", "awq"):
        given = {} if method == "int4-rtn" else {"calibration": text}
        folder = quantize(live(), tmp_path / method, method=method, group_size=16, **given)
        errors[method] = np.square(oracle_logits(tiny.CONFIG, plain_params(folder), ids) - want).mean()
    assert errors["gptq"] < errors["int4-rtn"] and errors["awq"] < errors["int4-rtn"], errors


def test_a_run_that_goes_on_in_the_middle_gives_the_same():
    config = quantized_config(tiny.CONFIG, "gptq", 16)
    ids = np.random.default_rng(2).integers(2, 259, (2, 256)).tolist()
    specs = dict(named_leaves(param_specs(config)))

    def values(source: CalibratedSource, layer: int) -> dict[str, np.ndarray]:
        names = [name for name in specs if name.startswith(f"layers.{layer}.")]
        return {name: source.read(name, tuple(slice(0, n) for n in specs[name].shape)) for name in names}

    in_order, from_the_middle = (
        CalibratedSource(TreeSource(tiny.params(), tiny.CONFIG).read, config, ids) for _ in range(2)
    )
    first, second = ({n: v for i in layers for n, v in values(source, i).items()} for source, layers in
                     ((in_order, (0, 1, 2)), (from_the_middle, (2, 0, 1))))  # fmt: skip
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array, err_msg=name)
        assert array.shape == specs[name].shape and array.dtype.name == (specs[name].dtype or "float32"), name


def test_calibration_that_cannot_be_is_refused(tmp_path):
    def refused(message: str, source=None, **options):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            quantize(source or live(), tmp_path / "no", group_size=16, **options)

    refused("calibration='x': quantize='int4-rtn' reads no text", method="int4-rtn", calibration="x")
    refused(f"{tmp_path / 'x'}: cannot be read: No such file", method="gptq", calibration=tmp_path / "x")
    (tmp_path / "x").write_bytes(b"")
    refused(f"{tmp_path / 'x'} has 0 tokens, at least 2", method="awq", calibration=tmp_path / "x")
    embed = np.full_like(tiny.params().embed, np.nan)
    refused("layers.0.qkv: its input on the calibration text is not finite", live(embed=embed), method="gptq")
