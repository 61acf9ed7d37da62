"""A bare decode step of Llama-3.1-8B shapes around paged attention: what a perfect engine would take per token.

Random weights, 32 unrolled layers, donated KV, greedy; every row is at 896 tokens and 32 further steps are timed.

    python -m benchmarks.kernels.decode_step --json FILE [--attention mosaic_gpu reference none]
        [--weights out_in in_out] [--batches 1 8 32]
"""

import argparse
import functools
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Format, Layout

from jaxserve.bench.ceilings import random_normal
from jaxserve.bench.environment import environment
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.gpu_decode import decode_attention
from pallas_kernels.paged_attention.gpu_split import Tuning

LAYERS, D, N, K, H, F, V, PS = 32, 4096, 32, 8, 128, 14336, 128256, 16
START, STEPS = 896, 32


def rms(x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


def attend(name: str, q: jax.Array, kv: jax.Array, table: jax.Array, lens: jax.Array) -> jax.Array:
    scale = H**-0.5
    match name:
        case "mosaic_gpu":
            return decode_attention(q, kv, table, lens, sm_scale=scale)
        case "early":
            return decode_attention(q, kv, table, lens, sm_scale=scale, tuning=Tuning(launch_early=True))
        case "reference":
            return reference.paged_attention(
                q, kv, table, lens, jnp.zeros((1,), jnp.int32), num_decode_rows=q.shape[0], sm_scale=scale
            )
        case "none":
            return q
        case _:
            raise ValueError(f"no attention is called {name}")


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, in], w [out, in] -> [B, out]."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def step(name: str, weights: Any, kvs: list[jax.Array], tokens: jax.Array, table: jax.Array, pos: jax.Array) -> Any:
    """tokens [B], pos [B] -> (next tokens [B], kvs)."""
    b = tokens.shape[0]
    x = weights["embed"][tokens]
    angle = pos[:, None, None] / (5e5 ** (jnp.arange(0, H, 2) / H))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rows = jnp.arange(b)
    page, offset = table[rows, pos // PS], pos % PS
    if b == 1:  # two updates keep the scatter in place
        page, offset = jnp.concatenate([page, page + (1 << 30)]), jnp.concatenate([offset, offset])
    out = []
    for w, kv in zip(weights["layers"], kvs, strict=True):
        q, k, v = jnp.split(product(rms(x), w["qkv"]), [N * H, (N + K) * H], -1)
        q, k = rope(q.reshape(b, N, H), cos, sin), rope(k.reshape(b, K, H), cos, sin)
        new = jnp.stack([k, v.reshape(b, K, H)], 2)
        kv = kv.at[page, :, :, offset].set(jnp.concatenate([new, new]) if b == 1 else new, mode="drop")
        out.append(kv)
        x = x + product(attend(name, q, kv, table, pos + 1).reshape(b, N * H), w["o"])
        gate, up = jnp.split(product(rms(x), w["gate_up"]), 2, -1)
        x = x + product(jax.nn.silu(gate) * up, w["down"])
    return jnp.argmax(
        lax.dot_general(rms(x), weights["head"], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32), -1
    ).astype(jnp.int32), out


def stored(layout: str, w: jax.Array) -> jax.Array:
    """``w`` [out, in] with its last (out_in) or its first axis (in_out) contiguous in memory. Takes ``w``'s place."""
    order = (0, 1) if layout == "out_in" else (1, 0)
    if w.format.layout.major_to_minor == order:
        return w
    return jax.device_put(w, Format(Layout(order), w.sharding), donate=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--attention", nargs="*", default=["mosaic_gpu", "none"])
    parser.add_argument("--weights", nargs="*", default=["out_in"], help="out_in, in_out: what is contiguous")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32, 64, 128, 256])
    args = parser.parse_args()
    r = functools.partial(random_normal, scale=0.02)
    shapes = {"qkv": ((N + 2 * K) * H, D), "o": (D, N * H), "gate_up": (2 * F, D), "down": (D, F)}  # [out, in]
    layers: Any = [{name: r(i, shape) for i, (name, shape) in enumerate(shapes.items())} for _ in range(LAYERS)]
    weights = {"layers": layers, "embed": r(5, (V, D)), "head": r(6, (V, D))}
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(weights)) - weights["embed"].nbytes
    results = []
    for layout, b in itertools.product(args.weights, args.batches):
        weights = jax.tree.map(functools.partial(stored, layout), weights)
        pages_per_row = 64
        table = jnp.asarray(
            np.random.default_rng(0).permutation(b * pages_per_row).reshape(b, pages_per_row), jnp.int32
        )
        for name in args.attention:
            kvs = [random_normal(7, (b * pages_per_row, K, 2, PS, H)) for _ in range(LAYERS)]
            pos, tokens = jnp.full((b,), START, jnp.int32), jnp.arange(b, dtype=jnp.int32)
            f = jax.jit(functools.partial(step, name), donate_argnums=(1,))
            start = time.perf_counter()
            tokens, kvs = f(weights, kvs, tokens, table, pos)
            tokens.block_until_ready()
            compile_s, times = time.perf_counter() - start, []
            positions = [pos + i for i in range(STEPS)]
            for _ in range(3):
                start = time.perf_counter()
                for p in positions:
                    tokens, kvs = f(weights, kvs, tokens, table, p)
                tokens.block_until_ready()
                times.append((time.perf_counter() - start) / STEPS)
            t = min(times)
            moved = weight_bytes + (0 if name == "none" else b * (START + STEPS // 2) * K * H * 4 * LAYERS)
            results.append({"batch": b, "attention": name, "weights": layout, "ms": t * 1e3,
                            "gb_per_s": moved / t / 1e9, "compile_s": compile_s})  # fmt: skip
            print(f"batch {b:4} {name:12} {layout:12} {t * 1e3:7.2f} ms {moved / t / 1e9:6.0f} GB/s, "
                  f"compiled in {compile_s:.1f} s", flush=True)  # fmt: skip
            del kvs
    if args.json:
        command = "python -m benchmarks.kernels.decode_step " + " ".join(Path(a).name for a in sys.argv[1:])
        record = environment() | {"command": command, "decode_step": results}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
