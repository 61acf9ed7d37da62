"""Paged decode attention on a GPU: right against the reference, then timed in % of the measured read bandwidth.

python -m benchmarks.kernels.paged_decode check
python -m benchmarks.kernels.paged_decode time --json FILE
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from benchmarks.kernels import measure
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.gpu_decode import decode_attention
from pallas_kernels.paged_attention.gpu_split import Tuning


@dataclasses.dataclass(frozen=True)
class Batch:
    name: str
    kv_lens: Sequence[int]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def kv_bytes(self) -> int:
        lens = self.kv_lens if self.window is None else [min(n, self.window) for n in self.kv_lens]
        return sum(lens) * self.num_kv_heads * self.head_dim * 4


def uneven(seed: int, rows: int, mean: int) -> list[int]:
    """Log-normal lengths and one very long row."""
    r = np.random.default_rng(seed)
    return [32768, *np.clip(r.lognormal(np.log(mean), 1.2, rows - 1).astype(int), 1, 16384).tolist()]


def inputs(batch: Batch, seed: int, copies: int, *, poison: bool) -> dict[str, Any]:
    """Permuted pages; with ``poison``, NaN in all that no row reaches and random ids behind each row's pages."""
    r = np.random.default_rng(seed)
    lens = np.asarray(batch.kv_lens)
    pages = -(-lens // batch.page_size)
    num_pages = int(pages.sum()) + 3
    ids = r.permutation(num_pages)
    table = r.integers(0, num_pages, (len(lens), int(pages.max()) + 1))
    reached = np.zeros((num_pages, batch.page_size), bool)
    start = 0
    for row, (count, n) in enumerate(zip(pages, lens, strict=True)):
        table[row, :count] = ids[start : start + count]
        tokens = np.arange(n)
        reached[table[row, tokens // batch.page_size], tokens % batch.page_size] = True
        start += count
    shape = (num_pages, batch.num_kv_heads, 2, batch.page_size, batch.head_dim)
    kv = [measure.random_normal(seed + i, shape) for i in range(copies)]
    if poison:
        kv = [jnp.where(jnp.asarray(reached)[:, None, None, :, None], x, jnp.nan) for x in kv]
    return {
        "q": measure.random_normal(seed + 99, (len(lens), batch.num_heads, batch.head_dim)),
        "kv_pages": kv,
        "page_table": jnp.asarray(table, jnp.int32),
        "kv_lens": jnp.asarray(lens, jnp.int32),
        "variant": {
            "sm_scale": batch.head_dim**-0.5,
            "window": batch.window,
            "softcap": batch.softcap,
            "sinks": measure.random_normal(seed + 98, (batch.num_heads,)) * 3 if batch.sinks else None,
        },
    }


def relative_error(batch: Batch, seed: int, tuning: Tuning | None) -> tuple[float, float]:
    """(relative error in the Euclidean norm, largest absolute error) against the reference in f32; NaN never passes."""
    x = inputs(batch, seed, 1, poison=True)
    kv = x["kv_pages"][0]
    with jax.default_matmul_precision("highest"):
        want = reference.paged_attention(
            x["q"].astype(jnp.float32), kv, x["page_table"], x["kv_lens"], jnp.zeros((1,), jnp.int32),
            num_decode_rows=len(batch.kv_lens), **x["variant"],
        )  # fmt: skip
    got = decode_attention(x["q"], kv, x["page_table"], x["kv_lens"], **x["variant"], tuning=tuning)
    difference = got.astype(jnp.float32) - want
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(want)), float(jnp.max(jnp.abs(difference)))


def check_cases() -> Iterator[Batch]:
    for page_size, (n, k, h) in itertools.product((16, 64), ((32, 8, 128), (9, 3, 64), (64, 8, 64), (20, 1, 128))):
        ps = page_size
        lens = [1, ps - 1, ps, ps + 1, 63, 64, 65, 0, 700, 4096, 129, 0]
        yield Batch(f"ragged page {ps} heads {n}/{k}x{h}", lens, n, k, h, ps)
    # What models need beyond that: dispatch.MOSAIC_GPU_CHECKED gets what passes here and in prefill_attention.
    lens = [1, 15, 16, 17, 127, 128, 129, 191, 192, 0, 700, 4096, 4097, 5000]
    yield Batch("page_size 128", lens, page_size=128)
    yield Batch("window", lens, window=128)
    yield Batch("window 4096, one row", [20000], window=4096)
    yield Batch("softcap", lens, 32, 16, softcap=2.0)
    yield Batch("sinks", lens, 64, 8, 64, sinks=True)
    yield Batch("GPT-OSS", lens, 64, 8, 64, window=128, sinks=True)
    yield Batch("head_dim 96", lens, 32, 32, 96, window=2047)
    yield Batch("head_dim 256", lens, 16, 8, 256)
    yield Batch("head_dim 256, page_size 128, window, softcap", lens, 4, 1, 256, 128, window=512, softcap=50.0)
    yield Batch("no grouping, page 32", [33, 2000, 1], 16, 16, 128, 32)
    yield Batch("one row", [5000])
    yield Batch("one short row", [3])
    yield Batch("uneven", uneven(0, 64, 500))
    yield Batch("many", np.random.default_rng(1).integers(1, 1500, 256).tolist())


def check() -> bool:
    ok = True
    for seed, batch in enumerate(check_cases()):
        error, largest = relative_error(batch, seed, None)
        good = error < 5e-3
        ok &= good
        print(f"{'ok  ' if good else 'FAIL'} {batch.name}: {error:.1e} relative, {largest:.1e} largest", flush=True)
    # The same inputs twice: an error that moves would be a race.
    x = inputs(Batch("uneven", uneven(3, 100, 900)), 7, 1, poison=True)
    outs = [
        decode_attention(x["q"], x["kv_pages"][0], x["page_table"], x["kv_lens"], **x["variant"]) for _ in range(20)
    ]
    same = all(bool(jnp.array_equal(o, outs[0])) for o in outs)
    print("same bits in 20 runs:", same, flush=True)
    return ok and same


TIMED = (
    Batch("8 x 4096", [4096] * 8),
    Batch("32 x 4096", [4096] * 32),
    Batch("64 x 2048", [2048] * 64),
    Batch("128 x 1024", [1024] * 128),
    Batch("256 x 900", [900] * 256),
    Batch("uneven 64", uneven(0, 64, 1500)),
    Batch("1 x 900", [900]),
    Batch("8 x 900", [900] * 8),
    Batch("32 x 900", [900] * 32),
    Batch("32 x 4096 page 64", [4096] * 32, page_size=64),
    Batch("64 x 4096 head_dim 64", [4096] * 64, 32, 8, 64),
    Batch("64 x 4096 window 1024", [4096] * 64, window=1024),
    Batch("64 x 4096 head_dim 64 window 128 sinks", [4096] * 64, 64, 8, 64, window=128, sinks=True),
    Batch("32 x 4096 softcap", [4096] * 32, softcap=50.0),
    Batch("32 x 4096 page 128", [4096] * 32, page_size=128),
    Batch("32 x 4096 head_dim 256", [4096] * 32, 16, 8, 256),
    Batch("32 x 4096 head_dim 96", [4096] * 32, 32, 8, 96),
)
VARIANTS = {
    "default": None,
    "early": Tuning(launch_early=True),
    "one stream": Tuning(streams_per_sm=1, ring=10),
    "ring 3": Tuning(ring=3),
    "min 1": Tuning(min_tiles=1),
    "min 4": Tuning(min_tiles=4),
}


def time_batch(batch: Batch, tuning: Tuning | None, calls: int = 16) -> tuple[float, dict[str, float]]:
    """Seconds of one call inside a graph of many over rotating caches; and microseconds of each kernel alone."""
    copies = max(1, min(calls, -(-(1 << 29) // batch.kv_bytes)))  # several times the L2 cache
    x = inputs(batch, 0, copies, poison=False)

    @jax.jit
    def chain(q: jax.Array, kv: list[jax.Array], table: jax.Array, lens: jax.Array) -> jax.Array:
        for i in range(calls):
            q = decode_attention(q, kv[i % copies], table, lens, **x["variant"], tuning=tuning)
        return q

    args = (x["q"], x["kv_pages"], x["page_table"], x["kv_lens"])
    t = measure.seconds(lambda: chain(*args)) / calls
    _, kernels = profiler.measure(chain, aggregate=False)(*args)
    alone: dict[str, list[float]] = {}
    for name, ms in kernels or ():
        alone.setdefault(name, []).append(ms * 1e3)
    return t, {name: float(np.median(v)) for name, v in alone.items() if len(v) >= calls // 2}


def run_times(json: str | None, names: list[str], batches: list[str]) -> None:
    ceilings = measure.ceilings()
    print({k: round(v, 1) for k, v in ceilings.items()}, flush=True)
    best = max(ceilings["reduce_read_gb_per_s"], ceilings["skinny_product_gb_per_s"])
    rows = []
    for batch in (x for x in TIMED if x.name in batches):
        for name in names:
            tuning = VARIANTS[name]
            t, kernels = time_batch(batch, tuning)
            rate = batch.kv_bytes / t / 1e9
            rows.append({
                "batch": batch.name, "variant": name, "us": t * 1e6, "gb_per_s": rate,
                "percent_of_read": 100 * rate / best, "kernels_us": kernels,
            })  # fmt: skip
            parts = " ".join(f"{k[:24]}={v:.1f}" for k, v in kernels.items())
            print(f"{batch.name:24} {name:12} {t * 1e6:8.1f} us {rate:7.0f} GB/s {100 * rate / best:5.1f} %  {parts}",
                  flush=True)  # fmt: skip
    measure.write(json, {"ceilings": ceilings, "paged_decode": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--json")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--batches", nargs="*", default=[batch.name for batch in TIMED])
    args = parser.parse_args()
    if args.what == "check":
        sys.exit(0 if check() else 1)
    run_times(args.json, args.variants, args.batches)


if __name__ == "__main__":
    main()
