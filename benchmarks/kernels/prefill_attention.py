"""What attention of prompt chunks costs today: cuDNN's dense causal kernel, and the jnp reference over pages.

python -m benchmarks.kernels.prefill_attention check
python -m benchmarks.kernels.prefill_attention time --json FILE
"""

import argparse
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import measure
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.gpu_prefill import Tuning, prefill_attention

N, K, H, PS = 32, 8, 128, 16


def inputs(
    rows: list[tuple[int, int]], n: int = N, k: int = K, h: int = H, page_size: int = PS
) -> dict[str, jax.Array]:
    """Chunks of ``rows`` (queries, keys) with permuted pages and NaN behind each row's last key."""
    pages = [-(-keys // page_size) for _, keys in rows]
    ids = np.random.default_rng(0).permutation(sum(pages) + 1)
    table = np.zeros((len(rows), max(pages) + 1), np.int32)
    reached = np.zeros((len(ids), page_size), bool)
    for row, ((_, keys), count) in enumerate(zip(rows, pages, strict=True)):
        table[row, :count], ids = ids[:count], ids[count:]
        tokens = np.arange(keys)
        reached[table[row, tokens // page_size], tokens % page_size] = True
    kv = measure.random_normal(3, (len(reached), k, 2, page_size, h))
    return {
        "q": measure.random_normal(4, (sum(new for new, _ in rows), n, h)),
        "kv_pages": jnp.where(jnp.asarray(reached)[:, None, None, :, None], kv, jnp.nan),
        "page_table": jnp.asarray(table),
        "kv_lens": jnp.asarray([keys for _, keys in rows], jnp.int32),
        "cu_q_lens": jnp.asarray(np.cumsum([0] + [new for new, _ in rows]), jnp.int32),
    }


@functools.partial(jax.jit, static_argnames=("sm_scale", "window", "softcap"))
def reference_chunks(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sm_scale: float = H**-0.5,
    **variant: Any,
) -> jax.Array:
    return reference.paged_attention(
        q, kv_pages, page_table, kv_lens, cu_q_lens, num_decode_rows=0, sm_scale=sm_scale, **variant
    )


# Query heads, kv heads, head_dim, page size, and the variant: dispatch.MOSAIC_GPU_CHECKED gets what passes here and in
# paged_decode.
CHECKED: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "plain": (N, K, H, PS, {}),
    "head_dim 64, group of 3": (9, 3, 64, 16, {}),
    "page_size 32": (N, K, H, 32, {}),
    "page_size 64": (N, K, H, 64, {}),
    "page_size 128": (N, K, H, 128, {}),
    "window": (N, K, H, PS, {"window": 300}),
    "softcap": (N, 16, H, PS, {"softcap": 2.0}),
    "sinks": (64, 8, 64, PS, {"sinks": True}),
    "GPT-OSS": (64, 8, 64, PS, {"window": 128, "sinks": True}),
    "head_dim 96": (32, 32, 96, PS, {"window": 2047}),
    "head_dim 256": (16, 8, 256, PS, {}),
    "head_dim 256, page_size 128, window, softcap": (4, 1, 256, 128, {"window": 512, "softcap": 50.0}),
}


def check() -> bool:
    ok = True
    for name, (n, k, h, page_size, changes) in CHECKED.items():
        x = inputs([(100, 130), (1, 700), (411, 2900), (75, 75), (0, 0)], n, k, h, page_size)
        variant = {"sm_scale": h**-0.5, **changes}
        if "sinks" in changes:
            variant["sinks"] = measure.random_normal(5, (n,)) * 3
        got = prefill_attention(**x, **variant).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            want = reference_chunks(**(x | {"q": x["q"].astype(jnp.float32)}), **variant)
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        ok &= error < 5e-3
        print(f"{'ok  ' if error < 5e-3 else 'FAIL'} {name}: {error:.1e} relative", flush=True)
    return ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.what == "check":
        sys.exit(0 if check() else 1)
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

    peak = measure.ceilings()["bf16_tflop_per_s"]
    print(f"bf16 product: {peak:.0f} TFLOP/s")
    # (queries, keys) of each row; the reference is slow, so only where it is the check.
    for rows, with_reference in (
        ([(512, 512)], True),
        ([(100, 130), (1, 700), (411, 1411), (0, 0)], True),
        ([(512, 4096)], True),
        ([(2048, 2048)], False),
        ([(4096, 4096)], False),
        ([(2048, 2048)] * 4, False),
        ([(8192, 8192)], False),
        ([(2048, 16384)], False),
    ):
        args_ = inputs(rows)
        flops = sum(4 * N * H * new * (keys - new / 2) for new, keys in rows)
        name = " + ".join(f"{new} of {keys}" for new, keys in rows)[:40]
        for tuning in (Tuning(), Tuning(block_kv=64, ring=10)):
            f = functools.partial(prefill_attention, **args_, sm_scale=H**-0.5, tuning=tuning)
            record(f"ours, tiles of {tuning.block_kv}: {name}", measure.seconds(f), flops)
            if with_reference:
                with jax.default_matmul_precision("highest"):
                    want = reference_chunks(**(args_ | {"q": args_["q"].astype(jnp.float32)}))
                error = float(jnp.linalg.norm(f().astype(jnp.float32) - want) / jnp.linalg.norm(want))
                results.append({"name": f"relative error, tiles of {tuning.block_kv}: {name}", "error": error})
                print(f"{'ok  ' if error < 5e-3 else 'FAIL'} {name}: {error:.1e} relative", flush=True)
        if with_reference:
            t = measure.seconds(functools.partial(reference_chunks, **args_), calls=2, rounds=3)
            record(f"reference: {name}", t, flops)
    measure.write(args.json, {"prefill_attention": results})


if __name__ == "__main__":
    main()
