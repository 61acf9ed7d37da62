"""Products of few tokens with Llama-3.1-8B's matrices: XLA's in both weight layouts, and ours, in % of read bandwidth.

python -m benchmarks.kernels.skinny_matmul --json FILE [--tokens 1 32 128]
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.kernels import measure
from pallas_kernels.linear.gpu import Tuning, linear

SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # [N, K]
VARIANTS = {
    "tiles of 128": Tuning(),
    "tiles of 64": Tuning(block_k=64),
    "tiles of 64, ring 4": Tuning(block_k=64, ring=4),
}


def xla(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [T, K], w [N, K] -> [T, N] f32."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def xla_transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [T, K], w [K, N] -> [T, N] f32."""
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def chain_seconds(f: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, ws: list[jax.Array]) -> float:
    """Seconds of one product inside a graph of one for each of ``ws``, each waiting for the one before."""

    @jax.jit
    def chain(x: jax.Array, ws: list[jax.Array]) -> jax.Array:
        for w in ws:
            x = x + (f(x, w)[:, :1] * 1e-6).astype(x.dtype)
        return x

    return measure.seconds(lambda: chain(x, ws)) / len(ws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 32, 128])
    args = parser.parse_args()
    ceilings = measure.ceilings()
    print({k: round(v, 1) for k, v in ceilings.items()}, flush=True)
    best, rows = ceilings["reduce_read_gb_per_s"], []
    for shape, (n, k) in SHAPES.items():
        copies = max(4, -(-(1 << 29) // (n * k * 2)))  # several times the L2 cache
        ws = [measure.random_normal(i, (n, k), scale=k**-0.5) for i in range(copies)]
        transposed = [w.T.copy() for w in ws]
        for m in args.tokens:
            x = measure.random_normal(99, (m, k))
            want = xla(x, ws[0])
            runs = {"xla [out, in]": (xla, ws), "xla [in, out]": (xla_transposed, transposed)}
            for name, t in VARIANTS.items():
                error = float(jnp.max(jnp.abs(linear(x, ws[0], tuning=t) - want)))
                if not error < 1e-3:
                    print(f"FAIL {shape} {m} {name}: {error:.1e} largest difference", flush=True)
                runs[name] = (functools.partial(linear, tuning=t), ws)
            for name, (f, weights) in runs.items():
                s = chain_seconds(f, x, weights)
                rate = n * k * 2 / s / 1e9
                rows.append({"shape": shape, "tokens": m, "variant": name, "us": s * 1e6, "gb_per_s": rate,
                             "percent_of_read": 100 * rate / best})  # fmt: skip
                print(f"{shape:8} {m:4} {name:24} {s * 1e6:7.1f} us {rate:6.0f} GB/s {100 * rate / best:5.1f} %",
                      flush=True)  # fmt: skip
        measure.write(args.json, {"ceilings": ceilings, "skinny_matmul": rows})
        del ws, transposed


if __name__ == "__main__":
    main()
