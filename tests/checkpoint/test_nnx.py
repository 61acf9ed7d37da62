"""A trainer's nnx module, through a table of names, into an engine."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import Engine, SamplingParams
from jaxserve.checkpoint.nnx import GATE, KEYS, QUERIES, UP, VALUES, Source, params_from_nnx
from jaxserve.model.params import named_leaves, param_specs
from tests import tiny

CONFIG = replace(tiny.CONFIG, num_layers=2)
D, F, N, K, H, V = 32, 48, 8, 4, 8, 259


class Block(nnx.Module):
    """Projections with heads apart, as flax' attention has them, and plain Linears, as its MLPs have."""

    def __init__(self, rngs: nnx.Rngs):
        self.attn_norm, self.mlp_norm = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
        self.q = nnx.LinearGeneral(D, (N, H), use_bias=False, rngs=rngs)
        self.k = nnx.LinearGeneral(D, (K, H), use_bias=False, rngs=rngs)
        self.v = nnx.LinearGeneral(D, (K, H), use_bias=False, rngs=rngs)
        self.o = nnx.Linear(N * H, D, use_bias=False, rngs=rngs)
        self.gate, self.up = (nnx.Linear(D, F, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:  # [T, D]
        def rotate(u: jax.Array) -> jax.Array:
            a, b = jnp.split(u, 2, axis=-1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        y = self.attn_norm(x)
        q, k, v = rotate(self.q(y)), rotate(self.k(y)), self.v(y)
        k, v = (jnp.repeat(u, N // K, axis=1) for u in (k, v))
        scores = jnp.einsum("tnh,snh->nts", q, k) * H**-0.5
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
        x = x + self.o(jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores, axis=-1), v).reshape(len(x), -1))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Trainee(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(CONFIG.num_layers)])
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:  # [T] -> [T, V]
        angles = jnp.arange(len(ids))[:, None, None] * 10_000.0 ** (-jnp.arange(0, H, 2) / H)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, jnp.cos(angles), jnp.sin(angles))
        return self.head(self.norm(x))


NAMES = {
    "embed": (Source("embed.embedding", "v d"),),
    "final_norm": (Source("norm.scale", "d"),),
    "head": (Source("head.kernel", "d v"),),
    "attn_norm": (Source("blocks.{i}.attn_norm.scale", "d"),),
    "mlp_norm": (Source("blocks.{i}.mlp_norm.scale", "d"),),
    "qkv": (
        Source("blocks.{i}.q.kernel", "d (k s) h", {"s": QUERIES}),
        Source("blocks.{i}.k.kernel", "d (k s) h", {"s": KEYS}),
        Source("blocks.{i}.v.kernel", "d (k s) h", {"s": VALUES}),
    ),
    "attn_out": (Source("blocks.{i}.o.kernel", "o d"),),
    "gate_up": (
        Source("blocks.{i}.gate.kernel", "d f", {"u": GATE}),
        Source("blocks.{i}.up.kernel", "d f", {"u": UP}),
    ),
    "down": (Source("blocks.{i}.down.kernel", "f d"),),
}


@pytest.fixture(scope="module")
def model() -> Trainee:
    model = Trainee(nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    state = nnx.state(model, nnx.Param)  # norms too are random
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state))
    return model


def greedy(model: Trainee, prompt: list[int], count: int) -> list[int]:
    ids = np.zeros(len(prompt) + count, np.int32)  # of one length: what follows a token does not change it
    ids[: len(prompt)] = prompt
    run = nnx.jit(lambda model, ids: model(ids).argmax(axis=-1))
    for i in range(len(prompt), len(ids)):
        ids[i] = run(model, ids)[i - 1]
    return ids[len(prompt) :].tolist()


def test_the_engine_says_what_the_module_says(model: Trainee):
    prompt, params = tiny.prompts(1)[0], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 1, "num_pages": 16, "page_size": 4}
    source = params_from_nnx(nnx.state(model, nnx.Param), CONFIG, NAMES)
    expected = greedy(model, prompt, 4)
    options["prefill_sizes"] = (16,)
    with Engine.from_params(replace(CONFIG, norm_eps=1e-6), source, mesh="stage=2,tensor=2", **options) as engine:
        assert engine.generate([prompt], params)[0].token_ids == expected
        engine.update_params(params_from_nnx(model, CONFIG, NAMES))
        assert engine.generate([prompt], params)[0].token_ids == expected


def test_any_part(model: Trainee):
    source = params_from_nnx(model, CONFIG, NAMES)
    for name, spec in named_leaves(param_specs(CONFIG)):
        whole = source.read(name, tuple(slice(0, n) for n in spec.shape))
        part = tuple(slice(n // 3, n // 3 + max(1, n // 2)) for n in spec.shape)
        assert whole.shape == spec.shape and np.array_equal(source.read(name, part), whole[part]), name
    q = np.asarray(model.blocks[1].q.kernel[...])  # [D, N, H]
    assert np.array_equal(
        source.read("layers.1.qkv", (slice(2, 3), slice(1, 2), slice(0, 8), slice(0, 32)))[0, 0], q[:, 5].T
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda n: n.pop("down"), r"params\.layers\.0\.down of shape \(32, 48\) has no name in the table"),
        (lambda n: n.update(down=(Source("blocks.{i}.dwn.kernel", "f d"),)),
         r"params\.layers\.0\.down: the state has no 'blocks\.0\.dwn\.kernel', expected shape \(48, 32\)"),
        (lambda n: n.update(down=(Source("blocks.{i}.down.kernel", "d f"),)),
         r"params\.layers\.0\.down: 'blocks\.0\.down\.kernel' has shape \(48, 32\), expected \(32, 48\)"),
        (lambda n: n.update(mlp_norm=n["attn_norm"]),
         r"the state's 'blocks\.0\.mlp_norm\.scale' of shape \(32,\) is in no name of the table"),
    ],
)  # fmt: skip
def test_what_does_not_match(change: Any, named: str, model: Trainee):
    names = dict(NAMES)
    change(names)
    with pytest.raises(ValueError, match=named):
        params_from_nnx(model, CONFIG, names)
