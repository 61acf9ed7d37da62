"""Rotation and append on Hopper: right against the reference, then timed beside what XLA makes of the same.

python -m benchmarks.kernels.rope_append check
python -m benchmarks.kernels.rope_append time --out FOLDER [--tokens 1 128] [--variants ours]

With ``--dry`` either runs on a CPU in the interpreter, at a few small shapes: that the script works, no times.
"""

import argparse
import functools
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import profile_summary
from benchmarks.kernels import measure
from jaxserve.cache import pages
from jaxserve.model.rope import apply_rope
from pallas_kernels.rope_append import gpu, reference

TOKENS = (1, 2, 8, 64, 128, 256, 1024, 8192)
LAYERS = 16  # of one program
PREFILL = 1024  # from here on queries are wanted as [T, N, H], below as rows for decode attention


class Case(NamedTuple):
    tokens: int
    k_heads: int = 8
    group: int = 4
    head_dim: int = 128
    rotary_dim: int = 128
    page_size: int = 16
    num_pages: int = 1024
    norms: bool = False
    q_rows: int | None = 8


CHECKS = [
    *(Case(t) for t in (1, 2, 3, 8, 100, 128, 256)),
    *(Case(t, q_rows=None) for t in (1, 500, 8192)),
    Case(64, 4, 2, norms=True),  # Qwen3, two of four devices
    Case(64, 1, 8),
    Case(64, 3, 3, 64, 64),
    Case(64, 8, 8, 64, 64, 64),
    Case(64, 8, 2, 256, 256, norms=True),
    Case(64, 32, 1, 96, 96, q_rows=None),
    Case(64, 2, 16, 128, 64, 128, q_rows=16),
    Case(64, 8, 4, 128, 0),
    Case(64, num_pages=70_000),  # more elements than 31 bits count
]
SMALL = [Case(3, 2, 2, 64, 64, 8, 4), Case(2, 1, 2, 64, 32, 8, 4, norms=True, q_rows=None)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def arguments(case: Case, seed: int) -> tuple[Any, ...]:
    """qkv, tables, write_index and norms, made on the device; the last slot is used, one is outside of the pages."""
    c = case
    keys = jax.random.split(jax.random.key(seed), 5)
    qkv = jax.random.normal(keys[0], (c.tokens, c.k_heads, c.group + 2, c.head_dim), jnp.float32).astype(jnp.bfloat16)
    angle = jax.random.uniform(keys[1], (c.tokens, c.rotary_dim // 2), jnp.float32, 0, 7)
    tables = (jnp.cos(angle), jnp.sin(angle)) if c.rotary_dim else None
    slots = c.num_pages * c.page_size
    index = (slots - 1 - jax.random.permutation(keys[2], 2 * c.tokens)[: c.tokens]).astype(jnp.int32)
    index = index.at[0].set(slots - 1 - 2 * c.tokens).at[c.tokens // 2].set(slots if c.tokens > 1 else slots - 1)
    norms = [jax.random.normal(k, (c.head_dim,), jnp.float32).astype(jnp.bfloat16) for k in keys[3:]]
    return qkv, tables, index, norms if c.norms else [None, None]


def excess(case: Case, seed: int, interpret: Any) -> float:
    """The largest error as a share of what rounding allows, in the queries and in the pages near the end; inf where a
    page is changed that should not be.

    Both compute in float32 and round once: where they differ by the order of float32's operations, a sum that lies
    beside the middle of two bfloat16 is rounded to either, a step of at most 2**-7 of the value. That may happen to one
    element of some hundreds, not to many.
    """
    qkv, tables, index, norms = arguments(case, seed)
    options = {"norm_eps": 1e-5, "q_rows": case.q_rows}
    shape = (case.num_pages, case.k_heads, 2, case.page_size, case.head_dim)
    used = min(case.num_pages, 2 + (2 * case.tokens + 1) // case.page_size + 1)  # pages from the end that are written
    # The reference may copy the pages it is given: it gets only those, its slots counted from the first of them.
    near = jnp.where(index < case.num_pages * case.page_size, index - (case.num_pages - used) * case.page_size, 1 << 30)
    want_q, want = reference.rope_append(qkv, tables, jnp.zeros((used, *shape[1:]), qkv.dtype), near, *norms, **options)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(kv_pages: jax.Array) -> Any:
        return gpu.rope_append(qkv, tables, kv_pages, index, *norms, **options, interpret=interpret)

    q, written = run(jnp.zeros(shape, qkv.dtype))
    if case.q_rows:
        q, want_q = q[:, :, : case.group], want_q[:, :, : case.group]
    changed = bool(jnp.any(written[: case.num_pages - used] != 0))
    worst = 0.0
    for got, wanted in ((q, want_q), (written[case.num_pages - used :], want)):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (got, wanted))
        bound = 2.0**-7 * (np.abs(b) + 1) if case.norms else 2.0**-7 * np.abs(b) + 2.0**-20
        share = np.abs(a - b) / bound
        worst = max(worst, float(np.max(share)) if not np.isnan(share).any() else float("inf"))
        if not case.norms:
            worst = max(worst, 200 * float(np.mean(a != b)))
    return float("inf") if changed else worst


def check(dry: bool) -> bool:
    ok = True
    for seed, case in enumerate(SMALL if dry else CHECKS):
        error = excess(case, seed, plgpu.InterpretGPUParams() if dry else None)
        good = error <= 1
        ok &= good
        print(f"{'ok    ' if good else 'FAILED'} {case}: {error:.3f} of the bound", flush=True)
    return ok


def by_xla(
    qkv: jax.Array, tables: tuple[jax.Array, jax.Array], kv_pages: jax.Array, index: jax.Array, *, q_rows: int | None
) -> tuple[jax.Array, jax.Array]:
    """What a layer of the model does without the kernel, to the same layouts."""
    t, k, width, h = qkv.shape
    wide = tables[0][:, None], tables[1][:, None]
    q = apply_rope(qkv[:, :, :-2].reshape(t, -1, h), wide)
    kv = jnp.stack([apply_rope(qkv[:, :, -2], wide), qkv[:, :, -1]], axis=2)
    if q_rows:
        q = jnp.pad(q.reshape(t, k, width - 2, h), ((0, 0), (0, 0), (0, q_rows - width + 2), (0, 0)))
    return q, pages.append(kv_pages, kv, index)


VARIANTS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {"ours": gpu.rope_append, "xla": by_xla}


def time_variant(f: Callable[..., Any], case: Case, layers: int, dry: bool) -> tuple[float, dict[str, float]]:
    """Seconds of a layer in a program of ``layers``, each waiting for the one before, and microseconds a layer of each
    kernel alone."""
    tables, index = arguments(case, 0)[1:3]
    qkvs = [arguments(case, i)[0] for i in range(layers)]
    shape = (case.num_pages, case.k_heads, 2, case.page_size, case.head_dim)
    interpret = {"interpret": plgpu.InterpretGPUParams()} if dry and f is gpu.rope_append else {}

    @functools.partial(jax.jit, donate_argnums=1)
    def run(qkvs: list[jax.Array], held: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        at, qs, out = index, [], []
        for qkv, kv_pages in zip(qkvs, held, strict=True):
            q, kv_pages = f(qkv, tables, kv_pages, at, q_rows=case.q_rows, **interpret)
            # Always zero, which XLA cannot know: the next layer waits for this one's pages.
            at = at + jnp.minimum(jnp.abs(kv_pages[0, 0, 0, 0, 0]).astype(jnp.int32), 0)
            qs, out = [*qs, q], [*out, kv_pages]
        return qs, out

    held = [jnp.zeros(shape, jnp.bfloat16) for _ in range(layers)]

    def again() -> list[jax.Array]:
        nonlocal held
        qs, held = run(qkvs, held)
        return qs

    if dry:
        jax.block_until_ready(again())
        return 0.0, {}
    seconds = measure.seconds(again)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([again() for _ in range(4)])
        intervals = max(profile_summary.kernels(Path(folder)).values(), key=len)
    alone = Counter[str]()
    for interval in intervals:
        alone[re.sub(r"[._]\d+$", "", interval.name)] += interval.duration_ns / 1e3 / (4 * layers)
    return seconds / layers, dict(alone)


def run_times(args: argparse.Namespace) -> None:
    ceilings = {} if args.dry else measure.ceilings()
    print({k: round(v, 1) for k, v in ceilings.items()}, flush=True)
    rows = []
    for tokens in args.tokens or ((1, 2) if args.dry else TOKENS):
        case = Case(tokens, num_pages=64 if args.dry else 4096, q_rows=8 if tokens < PREFILL else None)
        moved = tokens * case.k_heads * case.head_dim * 2 * 2 * (case.group + 2)  # bytes in and out, without padding
        for variant in args.variants or VARIANTS:
            s, kernels = time_variant(VARIANTS[variant], case, 2 if args.dry else LAYERS, args.dry)
            rows.append({
                "tokens": tokens, "variant": variant, "q_rows": case.q_rows, "us": s * 1e6,
                "gb_per_s": moved / s / 1e9 if s else None, "kernels_us": kernels,
            })  # fmt: skip
            parts = " ".join(f"{k[:24]}={v:.2f}" for k, v in kernels.items())
            print(
                f"{tokens:5} {variant:5} {s * 1e6:8.2f} us | kernels {sum(kernels.values()):.2f} us: {parts}",
                flush=True,
            )
        if args.out and not args.dry:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            measure.write(str(Path(args.out) / "rope_append.json"), {"ceilings": ceilings, "rope_append": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--dry", action="store_true", help="on a CPU, in the interpreter, small")
    parser.add_argument("--out", help="folder of rope_append.json")
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS))
    args = parser.parse_args()
    if args.what == "check":
        sys.exit(0 if check(args.dry) else 1)
    run_times(args)


if __name__ == "__main__":
    main()
