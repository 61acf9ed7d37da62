"""Layers of a decode step as one loop on the device, beside the same layers one after another: what each costs the host.

    PYTHONPATH=. python benchmarks/looped_layers.py --rows 2,32 --out FOLDER

The matrices are random int4 ones with biases (AWQ's shape), all layers' of a kind in one array; the loop's kernels find
a layer's by a number. XLA is asked to make one CUDA graph of it, loop and all (``WHILE``).
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.cache import pages
from jaxserve.model.rope import apply_rope
from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import gpu_stream
from pallas_kernels.paged_attention import paged_attention

D, INNER, HEADS, KV_HEADS, H, GROUP, PAGE_SIZE = 4096, 14336, 32, 8, 128, 128, 16
TUNING = gpu_stream.Tuning()


class Matrix(NamedTuple):
    weights: Any  # [LS F/64, D/128, 8, 128] int32
    scale: Any  # [LS F/64, D/G, 64] float16
    bias: Any
    num_features: int

    def __call__(self, x: jax.Array, layer: Any, ones: jax.Array) -> jax.Array:
        rows = self.num_features // 64
        split = gpu_stream.split_of(x.shape[0], rows, self.weights.shape[1], TUNING)
        x = jnp.pad(x, ((0, -x.shape[0] % split.tokens), (0, 0))).reshape(-1, split.tokens, x.shape[1])
        at = jnp.asarray(layer * rows, jnp.int32).reshape(1)
        return gpu_stream.multiply(
            x, self.weights, self.scale, self.bias, ones[: self.num_features], split=split, out_dtype=jnp.bfloat16,
            t=TUNING, first_row=at,
        )[: x.shape[0] * x.shape[1]]  # fmt: skip


SHAPES = {"qkv": ((HEADS + 2 * KV_HEADS) * H, D), "out": (D, HEADS * H), "up": (2 * INNER, D), "down": (D, INNER)}


def matrix_shape(features: int, inputs: int, layers: int, make: Any) -> Matrix:
    rows = layers * features // 64
    return Matrix(
        make((rows, inputs // 128, 8, 128), jnp.int32),
        make((rows, inputs // GROUP, 64), jnp.float16),
        make((rows, inputs // GROUP, 64), jnp.float16),
        features,
    )


def random(key: Any) -> Any:
    count = 0

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def one(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if dtype == jnp.int32:
            return lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), jnp.int32)
        return (0.004 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    def make(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        nonlocal count
        count += 1
        return one(jax.random.fold_in(key, count), shape, dtype)

    return make


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5) * weight).astype(x.dtype)


def layer_of(matrices: Any, ones: Any, norms: Any, tables: Any, page_table: Any, kv_lens: Any, index: Any, num_pages: int) -> Any:
    """``f(layer, (x, kv_pages))`` of all layers' pages in one array [LS NP, K, 2, PS, H]."""

    def layer(i: Any, carry: Any) -> Any:
        x, kv_pages = carry
        y = norm(x, norms[2 * i])
        qkv = matrices["qkv"](y, i, ones)[: x.shape[0]].reshape(x.shape[0], KV_HEADS, -1, H)
        q = apply_rope(qkv[:, :, :-2].reshape(x.shape[0], HEADS, H), tables)
        kv = jnp.stack([apply_rope(qkv[:, :, -2], tables), qkv[:, :, -1]], axis=2)
        kv_pages = pages.append(kv_pages, kv, index + i * (num_pages * PAGE_SIZE))
        out = paged_attention(
            q, kv_pages, page_table + i * num_pages, kv_lens, jnp.zeros((1,), jnp.int32), num_decode_rows=x.shape[0],
            sm_scale=H**-0.5, implementation=IMPLEMENTATION,
        )  # fmt: skip
        x = x + matrices["out"](out.reshape(x.shape[0], -1), i, ones)[: x.shape[0]]
        y = matrices["up"](norm(x, norms[2 * i + 1]), i, ones)[: x.shape[0]]
        y = jax.nn.silu(y[:, :INNER].astype(jnp.float32)) * y[:, INNER:].astype(jnp.float32)
        x = x + matrices["down"](y.astype(x.dtype), i, ones)[: x.shape[0]]
        return x, kv_pages

    return layer


IMPLEMENTATION: dispatch.Implementation = "mosaic_gpu"


def make_step(num_layers: int, num_pages: int, looped: bool) -> Any:
    def step(weights: Any, norms: Any, kv_pages: Any, x: Any, page_table: Any, kv_lens: Any, index: Any) -> Any:
        matrices = {n: Matrix(*w, SHAPES[n][0]) for n, w in weights.items()}
        angle = kv_lens[:, None, None].astype(jnp.float32) * jnp.ones((H // 2,))
        ones = jnp.ones((2 * INNER,), jnp.float32)
        layer = layer_of(
            matrices, ones, norms, (jnp.cos(angle), jnp.sin(angle)), page_table, kv_lens, index, num_pages
        )
        if looped:
            return lax.fori_loop(0, num_layers, layer, (x, kv_pages))
        carry = (x, kv_pages)
        for i in range(num_layers):
            carry = layer(i, carry)
        return carry

    return step


LOOP = {
    "xla_gpu_enable_dynamic_slice_fusion": False,
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "unrolled": (False, {"xla_gpu_enable_dynamic_slice_fusion": False}),
    "loop in the graph": (True, LOOP),
    "loop of graphs": (True, {"xla_gpu_enable_dynamic_slice_fusion": False}),
}


def arguments(rows: int, layers: int, num_pages: int, make: Any, ints: Any) -> tuple[Any, ...]:
    weights = {n: matrix_shape(*shape, layers, make)[:3] for n, shape in SHAPES.items()}
    pages_of_row = (num_pages - 1) // rows
    return (
        weights,
        make((2 * layers, D), jnp.float32),
        make((layers * num_pages, KV_HEADS, 2, PAGE_SIZE, H), jnp.bfloat16),
        make((rows, D), jnp.bfloat16),
        ints(jnp.arange(rows * pages_of_row, dtype=jnp.int32).reshape(rows, pages_of_row)),
        ints(jnp.full((rows,), 900, jnp.int32)),
        ints(jnp.arange(rows, dtype=jnp.int32) * (pages_of_row * PAGE_SIZE) + 899),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="2")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for rows in (int(r) for r in args.rows.split(",")):
        num_pages = rows * 60 + 1
        made = arguments(rows, args.layers, num_pages, random(jax.random.key(0)), jnp.asarray)
        wanted = None
        for name in args.variants:
            looped, options = VARIANTS[name]
            start = time.perf_counter()
            step = jax.jit(make_step(args.layers, num_pages, looped), donate_argnums=(2,))
            try:
                compiled = step.lower(*made).compile(compiler_options=options)
                built = time.perf_counter() - start
                weights, norms, kv_pages, x, *ints = made
                held = jnp.copy(kv_pages)
                calls, walls = [], []
                for in_flight in (0, 1):
                    pending: list[jax.Array] = []
                    call, wall = [], []
                    for _ in range(60):
                        begin = time.perf_counter()
                        y, held = compiled(weights, norms, held, x, *ints)
                        call.append(1e3 * (time.perf_counter() - begin))
                        pending.append(y)
                        if len(pending) > in_flight:
                            pending.pop(0).block_until_ready()
                        wall.append(1e3 * (time.perf_counter() - begin))
                    calls.append(statistics.median(call[20:]))
                    walls.append(statistics.median(wall[20:]))
                    jax.block_until_ready(pending)
                result = jnp.asarray(y, jnp.float32)
                wanted = result if wanted is None else wanted
                error = float(jnp.linalg.norm(result - wanted) / jnp.linalg.norm(wanted))
                del held
                row = {"rows": rows, "variant": name, "build_s": built, "call_ms": calls, "wall_ms": walls, "error": error,
                       "norm": float(jnp.linalg.norm(result))}  # fmt: skip
            except Exception as e:  # a variant that XLA cannot run is a finding
                row = {"rows": rows, "variant": name, "failed": f"{type(e).__name__}: {str(e)[:300]}"}
            found.append(row)
            print(row, flush=True)
    (args.out / "looped_layers.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
