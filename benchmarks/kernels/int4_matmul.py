"""The int4 and int8 products on Hopper: right against float64, then timed in % of the read bandwidth, beside XLA's.

python -m benchmarks.kernels.int4_matmul smoke    (small cases, the simplest first; one that hangs is given up)
python -m benchmarks.kernels.int4_matmul check
python -m benchmarks.kernels.int4_matmul time --out FOLDER [--tokens 1 16] [--shapes qkv] [--variants ours]
"""

import argparse
import functools
import itertools
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from benchmarks.kernels import measure
from pallas_kernels.int4_matmul.gpu import PreparedInt4, Tuning, int4_matmul, prepare
from pallas_kernels.int8_matmul import gpu as int8_gpu
from pallas_kernels.int8_matmul.gpu import PreparedInt8, int8_matmul

SHAPES = {"gate_up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "out": (4096, 4096)}  # [F, D]
EVERY_SHAPE = (1, 16, 64, 256)  # tokens that are timed of each shape
GATE_UP = (8, 32, 128, 512, 2048, 8192)  # and of this one besides
ROTATED_BYTES = 192 << 20  # of weights that a chain goes through: several times the L2 cache


class Matrix(NamedTuple):
    """As ``Int4Matrix``."""

    q: jax.Array  # [F, D/2]
    scale: jax.Array  # [F, D/G]
    bias: jax.Array | None


class Case(NamedTuple):
    m: int
    f: int
    d: int
    group: int = 128
    symmetric: bool = True
    repack: bool = True
    tuning: Tuning | None = None


def matrix(seed: int, case: Case) -> tuple[Matrix, np.ndarray]:
    """A random matrix and its weights in float64; features differ in scale by orders of magnitude."""
    r = np.random.default_rng(seed)
    numbers = r.integers(0, 16, (case.f, case.d), np.uint8)
    shape = case.f, case.d // case.group
    scale = (r.uniform(0.5, 2, shape) * 10.0 ** r.integers(-4, 2, (case.f, 1))).astype(np.float16).astype(np.float32)
    zero = np.full(shape, 8.0) if case.symmetric else r.integers(0, 16, shape)
    bias = (-zero * scale).astype(np.float32)
    weight = numbers.reshape(*shape, case.group) * scale[..., None].astype(np.float64) + bias[..., None]
    q = jnp.asarray(numbers[:, 0::2] | numbers[:, 1::2] << 4)
    return Matrix(q, jnp.asarray(scale), None if case.symmetric else jnp.asarray(bias)), weight.reshape(case.f, case.d)


def check_cases() -> Iterator[Case]:
    for m in (1, 8, 9, 16, 17, 32, 64, 100, 256):
        yield Case(m, 1536, 2048)
    for group, symmetric, m in itertools.product((32, 64, 128), (True, False), (3, 64)):
        if (group, symmetric) != (128, True):
            yield Case(m, 768, 1024, group, symmetric)
    yield Case(16, 768, 1024, 32, False)
    yield Case(5, 4864, 896)  # seven tiles of inputs
    yield Case(5, 200, 1504, 32, False)  # padded
    yield Case(20, 640, 512, 512, False)  # a scale a row; features not a multiple of 256
    for f, d in SHAPES.values():
        yield Case(16, f, d)
    for m in (1, 64):
        yield Case(m, 4096, 4096, symmetric=False)
        yield Case(m, 1536, 2048, repack=False)
        yield Case(m, 1536, 2048, tuning=Tuning(launch_early=True))
    for group, symmetric in ((128, True), (32, False)):
        for t in (Tuning(many_tokens=0), Tuning(many_tokens=0, xla_dequantizes=True)):
            yield Case(700, 768, 1024, group, symmetric, tuning=t)


def excess(case: Case, seed: int) -> float:
    """The largest error as a share of what rounding allows; NaN never passes."""
    w, weight = matrix(seed, case)
    x = measure.random_normal(seed, (case.m, case.d))
    prepared = prepare(w, repack=case.repack)
    t = case.tuning or Tuning()
    out = np.asarray(int4_matmul(x, prepared, tuning=t), np.float64)
    x64 = np.asarray(x.astype(jnp.float32), np.float64)
    want, terms = x64 @ weight.T, np.abs(x64) @ np.abs(weight).T
    # The output is rounded to bfloat16, and so are the weights where XLA multiplies; scales are float16 otherwise.
    relative = 2**-8 if case.m > t.many_tokens else 2**-11
    return float(np.max(np.abs(out - want) / (np.abs(want) * 2**-8 + terms * relative)))


_BARE = Tuning(num_sms=1, move_registers=False)
SMOKE: dict[str, Case] = {
    "dequantized by a kernel": Case(8, 256, 256, tuning=Tuning(many_tokens=0)),
    "one tile, registers as launched": Case(8, 128, 128, tuning=_BARE),
    "one tile": Case(8, 128, 128, tuning=Tuning(num_sms=1)),
    "two halves of a tile, registers as launched": Case(8, 128, 256, tuning=_BARE),
    "two halves of a tile": Case(8, 128, 256, tuning=Tuning(num_sms=1)),
    "a ring of 2 that turns": Case(8, 128, 2048, tuning=Tuning(num_sms=1, ring=2)),
    "cast": Case(8, 128, 2048, repack=False, tuning=Tuning(num_sms=1)),
    "pieces": Case(16, 768, 4096),
    "biases, groups of 32": Case(16, 768, 4096, 32, False),
    "64 tokens": Case(64, 768, 4096),
    "64 tokens, biases": Case(64, 768, 4096, symmetric=False),
    "whole blocks of features and tokens": Case(256, 1024, 1024, tuning=Tuning(num_sms=8)),
    "launched early": Case(16, 768, 4096, tuning=Tuning(launch_early=True)),
    "qkv of an 8B model, 1 token": Case(1, 6144, 4096),
}


def smoke_from(first: int) -> None:
    """Runs the cases from ``first`` on; each says when it begins, when it is compiled and how it ended."""
    for number, (name, case) in list(enumerate(SMOKE.items()))[first:]:
        print(f"begin {number} {name}", flush=True)
        start = time.perf_counter()
        w = prepare(matrix(number, case)[0], repack=case.repack)
        x = measure.random_normal(number, (case.m, case.d))
        int4_matmul.lower(x, w, tuning=case.tuning or Tuning()).compile()
        print(f"compiled {time.perf_counter() - start:.1f} s", flush=True)
        error = excess(case, number)
        print(f"{'ok    ' if error < 1 else 'FAILED'} {name}: {error:.3f} of the bound", flush=True)


def smoke(seconds: float = 15, compile_seconds: float = 60) -> bool:
    """All cases in another process, and in a new one from the next case on after one that hangs or dies."""
    done, ok = 0, True
    while done < len(SMOKE):
        command = [sys.executable, "-m", "benchmarks.kernels.int4_matmul", "smoke", "--from", str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
            lines: queue.Queue[str] = queue.Queue()

            def read(lines: queue.Queue[str] = lines, child: subprocess.Popen[str] = child) -> None:
                for line in child.stdout or ():
                    lines.put(line)
                lines.put("")

            threading.Thread(target=read, daemon=True).start()
            limit = compile_seconds
            try:
                while line := lines.get(timeout=limit):
                    print(line, end="", flush=True)
                    limit = seconds if line.startswith("compiled") else compile_seconds
                    if line.startswith(("ok ", "FAILED")):
                        done, ok = done + 1, ok and line.startswith("ok ")
                if child.wait() == 0:
                    break
                print(f"FAILED case {done}: exit status {child.returncode}", flush=True)
            except queue.Empty:
                print(f"FAILED case {done} hangs: nothing in {limit:.0f} s", flush=True)
            child.kill()
        done, ok = done + 1, False
    return ok


def int8_excess(m: int, f: int, d: int) -> float:
    """As ``excess``, of int8."""
    r = np.random.default_rng(m)
    q, scale = r.integers(-128, 128, (f, d), np.int8), r.uniform(0.5, 2, (f, 1)).astype(np.float32)
    x = measure.random_normal(m, (m, d))
    prepared = int8_gpu.prepare(Matrix(jnp.asarray(q), jnp.asarray(scale), None))
    x64, weight = np.asarray(x.astype(jnp.float32), np.float64), q * scale.astype(np.float64)
    want, terms = x64 @ weight.T, np.abs(x64) @ np.abs(weight).T
    error = np.abs(np.asarray(int8_matmul(x, prepared), np.float64) - want)
    return float(np.max(error / (np.abs(want) * 2**-8 + terms * 2**-14)))


def check() -> bool:
    ok = True
    for m, f, d in ((1, 1536, 2048), (16, 4096, 4096), (64, 768, 1024), (3, 200, 1504), (100, 200, 1504)):
        error = int8_excess(m, f, d)
        good = error < 1
        ok &= good
        print(f"{'ok    ' if good else 'FAILED'} int8 {m} x {f} x {d}: {error:.3f} of the bound", flush=True)
    for seed, case in enumerate(check_cases()):
        error = excess(case, seed)
        good = error < 1
        ok &= good
        print(f"{'ok    ' if good else 'FAILED'} {case}: {error:.3f} of the bound", flush=True)
    for m in (1, 16, 64):  # the same inputs twice: an error that moves would be a race
        case = Case(m, 6144, 4096, symmetric=False)
        w, x = prepare(matrix(7, case)[0]), measure.random_normal(7, (m, case.d))
        outs = [int4_matmul(x, w) for _ in range(50)]
        same = all(bool(jnp.array_equal(o, outs[0])) for o in outs)
        ok &= same
        print(f"{'ok    ' if same else 'FAILED'} same bits in 50 runs, {m} tokens", flush=True)
    return ok


def xla_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, D], w [F, D] -> [M, F] bfloat16."""
    out = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def xla_int4(x: jax.Array, w: tuple[jax.Array, jax.Array]) -> jax.Array:
    """What XLA makes of an int4 array [F, D] with scales [F, D/128]."""
    numbers, scale = w
    weight = numbers.astype(x.dtype).reshape(*scale.shape, -1) * scale[..., None].astype(x.dtype)
    return xla_product(x, weight.reshape(numbers.shape))


def xla_int8(x: jax.Array, w: tuple[jax.Array, jax.Array]) -> jax.Array:
    """What XLA makes of an int8 array [F, D] with scales [F]."""
    numbers, scale = w
    out = jax.lax.dot_general(x, numbers.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (out * scale).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def weights_of(variant: str, seed: int, f: int, d: int) -> Any:
    """Random weights [F, D] in the form that the variant takes, made on the device; groups of 128."""
    key, scale_key = jax.random.split(jax.random.key(seed))

    def words(bits: int) -> jax.Array:
        words = jax.random.bits(key, (f // 64, d // 128, 2 * bits, 128), jnp.uint32)
        return jax.lax.bitcast_convert_type(words, jnp.int32)

    def numbers(dtype: Any) -> jax.Array:
        per_word = 32 // jnp.iinfo(dtype).bits
        return jax.lax.bitcast_convert_type(jax.random.bits(key, (f, d // per_word), jnp.uint32), dtype).reshape(f, d)

    scale = jax.random.uniform(scale_key, (f // 64, d // 128, 64), jnp.float32, 0.5, 1.0).astype(jnp.float16)
    rows = jnp.full((f,), 2.0**-8)
    match variant:
        case "xla bf16":
            return (jax.random.normal(key, (f, d), jnp.float32) * d**-0.5).astype(jnp.bfloat16)
        case "xla int4":
            return numbers(jnp.int4), scale.transpose(0, 2, 1).reshape(f, -1)
        case "xla int8":
            return numbers(jnp.int8), rows
        case "int8":
            return PreparedInt8(words(8), rows)
        case "cast":
            return PreparedInt4(numbers(jnp.int4), scale, None, rows)
        case _:
            return PreparedInt4(words(4), scale, -scale if variant == "biases" else None, rows)


VARIANTS: dict[str, Callable[[jax.Array, Any], jax.Array]] = {
    "ours": int4_matmul,
    "biases": int4_matmul,
    "cast": int4_matmul,
    "early": functools.partial(int4_matmul, tuning=Tuning(launch_early=True)),
    "cut": functools.partial(int4_matmul, tuning=Tuning(busy=2)),
    "dequantize": functools.partial(int4_matmul, tuning=Tuning(many_tokens=0)),
    "by xla": functools.partial(int4_matmul, tuning=Tuning(many_tokens=0, xla_dequantizes=True)),
    "stream": functools.partial(int4_matmul, tuning=Tuning(many_tokens=1 << 20)),
    "int8": int8_matmul,
    "xla bf16": xla_product,
    "xla int4": xla_int4,
    "xla int8": xla_int8,
}


def is_timed(variant: str, shape: str, m: int) -> bool:
    """Without a choice by the command line: what decides something."""
    if variant in ("ours", "xla bf16"):
        return m in EVERY_SHAPE or (shape == "gate_up" and m in GATE_UP)
    return (m, variant) in {
        "qkv": [(1, "early"), (16, "early"), (16, "biases"), (16, "int8")],
        "out": [(16, "biases"), (16, "cast"), (16, "int8")],
        "gate_up": [(1, "xla int4"), (16, "cast"), (16, "biases"), (64, "biases"), (1, "int8"), (16, "int8"),
                    (16, "xla int8"), (16, "cut"), (64, "cut"), (256, "cut"), (2048, "stream"), (2048, "by xla")],
        "down": [(16, "early"), (16, "biases"), (16, "int8")],
    }[shape]  # fmt: skip


def time_product(f: Callable[..., jax.Array], x: jax.Array, weights: list[Any]) -> tuple[float, dict[str, float]]:
    """Seconds of one product inside a graph of one for each of ``weights``, each waiting for the one before, and
    microseconds of the kernels that make it, alone."""

    @jax.jit
    def chain(x: jax.Array, weights: list[Any]) -> jax.Array:
        for w in weights:
            y = f(x, w)  # all of it goes into the next x, in one fusion
            y = jnp.pad(y, ((0, 0), (0, -y.shape[1] % x.shape[1]))).reshape(x.shape[0], -1, x.shape[1])
            x = x + (jnp.sum(y, axis=1, dtype=jnp.float32) * 1e-6).astype(x.dtype)
        return x

    seconds = measure.seconds(lambda: chain(x, weights)) / len(weights)
    _, kernels = profiler.measure(chain, aggregate=False)(x, weights)
    alone: dict[str, list[float]] = {}
    for name, ms in kernels or ():
        alone.setdefault(name, []).append(ms * 1e3)
    return seconds, {name: float(np.median(v)) for name, v in alone.items() if len(v) >= len(weights) // 2}


def run_times(args: argparse.Namespace) -> None:
    ceilings = measure.ceilings()
    print({k: round(v, 1) for k, v in ceilings.items()}, flush=True)
    best, rows = max(ceilings["reduce_read_gb_per_s"], ceilings["skinny_product_gb_per_s"]), []
    chosen = bool(args.tokens or args.variants)
    tokens = args.tokens or sorted({*EVERY_SHAPE, *GATE_UP})
    for shape in args.shapes:
        f, d = SHAPES[shape]
        for variant in args.variants or VARIANTS:
            some = [m for m in tokens if chosen or is_timed(variant, shape, m)]
            if not some:
                continue
            one = weights_of(variant, 0, f, d)
            num_bytes = sum(x.nbytes // (2 if x.dtype == jnp.int4 else 1) for x in jax.tree.leaves(one))
            copies = max(4, -(-ROTATED_BYTES // num_bytes))
            weights = [one, *(weights_of(variant, i, f, d) for i in range(1, copies))]
            for m in some:
                x = measure.random_normal(99, (m, d))
                s, kernels = time_product(VARIANTS[variant], x, weights)
                alone = sum(kernels.values())
                rate, tflops = num_bytes / s / 1e9, 2 * m * f * d / s / 1e12
                rows.append({
                    "shape": shape, "tokens": m, "variant": variant, "us": s * 1e6, "gb_per_s": rate,
                    "percent_of_read": 100 * rate / best, "tflop_per_s": tflops, "kernels_us": kernels,
                })  # fmt: skip
                parts = " ".join(f"{k[:20]}={v:.1f}" for k, v in kernels.items())
                print(f"{shape:8} {m:5} {variant:10} {s * 1e6:8.1f} us {rate:6.0f} GB/s {100 * rate / best:5.1f} % "
                      f"{tflops:6.1f} TFLOP/s | kernels {alone:.1f} us: {parts}", flush=True)  # fmt: skip
            del weights, one
            if args.out:
                Path(args.out).mkdir(parents=True, exist_ok=True)
                measure.write(str(Path(args.out) / "int4_matmul.json"), {"ceilings": ceilings, "int4_matmul": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["smoke", "check", "time"])
    parser.add_argument("--from", dest="first", type=int, help="of smoke: in this process, from this case on")
    parser.add_argument("--out", help="folder of int4_matmul.json")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS))
    args = parser.parse_args()
    if args.what == "smoke" and args.first is not None:
        smoke_from(args.first)
        return
    if args.what != "time":
        sys.exit(0 if (smoke if args.what == "smoke" else check)() else 1)
    run_times(args)


if __name__ == "__main__":
    main()
