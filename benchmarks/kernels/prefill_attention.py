"""What attention of prompt chunks costs today: cuDNN's dense causal kernel, and the jnp reference over pages.

python -m benchmarks.kernels.prefill_attention --json FILE
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import measure
from pallas_kernels.paged_attention import reference

N, K, H, PS = 32, 8, 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    args = parser.parse_args()
    results = []

    def record(name: str, s: float, flops: float) -> None:
        results.append({"name": name, "us": s * 1e6, "tflop_per_s": flops / s / 1e12})
        print(f"{name:40} {s * 1e6:10.1f} us {flops / s / 1e12:7.1f} TFLOP/s", flush=True)

    dense = jax.jit(
        lambda q, k, v, n: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn", query_seq_lengths=n, key_value_seq_lengths=n
        )
    )
    for b, t in ((1, 512), (1, 2048), (4, 2048), (16, 512), (1, 4096), (1, 8192)):
        q = measure.random_normal(0, (b, t, N, H))
        k, v = (measure.random_normal(i, (b, t, K, H)) for i in (1, 2))
        flops = 4 * b * t * t * N * H / 2
        record(f"cudnn {b} x {t}", measure.seconds(lambda: dense(q, k, v, None)), flops)  # noqa: B023
        n = jnp.full((b,), t, jnp.int32)
        record(f"cudnn {b} x {t} with lengths", measure.seconds(lambda: dense(q, k, v, n)), flops)  # noqa: B023

    chunks = jax.jit(
        lambda q, kv, table, lens, cu: reference.paged_attention(
            q, kv, table, lens, cu, num_decode_rows=0, sm_scale=H**-0.5
        )
    )
    for rows, new, keys in ((1, 512, 512), (1, 2048, 2048), (4, 512, 512), (1, 512, 4096)):
        pages = keys // PS
        kv = measure.random_normal(3, (rows * pages, K, 2, PS, H))
        table = jnp.asarray(np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages), jnp.int32)
        q = measure.random_normal(4, (rows * new, N, H))
        lens, cu = jnp.full((rows,), keys, jnp.int32), jnp.arange(rows + 1, dtype=jnp.int32) * new
        flops = 4 * rows * N * H * new * (keys - new / 2)
        record(
            f"reference {rows} x {new} of {keys} keys",
            measure.seconds(lambda: chunks(q, kv, table, lens, cu), calls=3, rounds=3),  # noqa: B023
            flops,
        )
    measure.write(args.json, {"prefill_attention": results})


if __name__ == "__main__":
    main()
