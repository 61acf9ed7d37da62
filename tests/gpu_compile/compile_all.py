"""Compiles every case for H100s that are not there, and writes what came of each as JSON; ``launch`` starts it.

python -m tests.gpu_compile.compile_all OUT.json DUMP_FOLDER NAME ...
"""

import functools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxserve.cache.pages import NUMBERS, values_and_scales
from jaxserve.config import ParallelConfig
from jaxserve.execution.lowering import compile_step
from jaxserve.parallel.mesh import make_mesh
from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import gpu_product
from pallas_kernels.paged_attention import gpu_decode_quantized
from pallas_kernels.paged_attention.gpu_decode import decode_attention
from pallas_kernels.paged_attention.gpu_prefill import Tuning as PrefillTuning
from pallas_kernels.paged_attention.gpu_prefill import prefill_attention
from pallas_kernels.paged_attention.gpu_split import Tuning
from pallas_kernels.rope_append.gpu import rope_append
from tests.described_step import CHUNK_TOKENS, MAX_MODEL_LEN, NUM_PAGES, PAGE_SIZE, described_step
from tests.gpu_compile import hlo, hopper
from tests.gpu_compile.cases import (
    APPENDS,
    KERNELS,
    PRODUCTS,
    STEPS,
    AppendCase,
    KernelCase,
    ProductCase,
    StepCase,
)

MOSAIC_CALL = "mosaic_gpu_v2"
# What XLA puts into a graph unless told otherwise (jax 0.11.2).
CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION"


def with_output[T](run: Callable[[], T]) -> tuple[T, str]:
    """What ``run`` returns, and what was written to the process's own output: the assembler is not in Python."""
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            result = run()
        finally:
            for saved, fd in zip(kept, (1, 2)):
                os.dup2(saved, fd)
                os.close(saved)
        log.seek(0)
        return result, log.read().decode(errors="replace")


def assembled(log: str) -> dict[str, list[int]]:
    """What the assembler says of each of our kernels."""
    return {
        "registers": [int(x) for x in re.findall(r"Used (\d+) registers", log)],
        "spilled_bytes": [int(x) for x in re.findall(r"(\d+) bytes spill stores", log)],
    }


def compile_kernel(case: KernelCase) -> dict[str, Any]:
    sharding = jax.sharding.SingleDeviceSharding(hopper.devices(1)[0])
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    is_prefill = isinstance(case.tuning, PrefillTuning)
    pages = shape(
        (NUM_PAGES, case.num_kv_heads, 2, case.page_size, case.head_dim),
        jnp.bfloat16 if case.cache is None else NUMBERS[case.cache],
    )
    arguments = [
        shape((CHUNK_TOKENS if is_prefill else case.rows, case.num_heads, case.head_dim), jnp.bfloat16),
        pages,
        shape((case.rows, MAX_MODEL_LEN // case.page_size), jnp.int32),
        shape((case.rows,), jnp.int32),
    ]
    if is_prefill:
        arguments.append(shape((case.rows + 1,), jnp.int32))
    tuning = None if case.tuning in (Tuning(), PrefillTuning()) else case.tuning  # None: what the shape gets by default
    decode = decode_attention if case.cache is None else gpu_decode_quantized.decode_attention
    kernel = functools.partial(
        prefill_attention if is_prefill else decode,
        sm_scale=case.head_dim**-0.5,
        tuning=tuning,
        window=case.window,
        softcap=case.softcap,
    )
    named = {"sinks": shape((case.num_heads,), jnp.float32) if case.sinks else None}
    if case.cache is not None:
        named["kv_scales"] = shape(pages.shape[:-1], jnp.bfloat16)
    attend = jax.jit(lambda named, *arguments: kernel(*arguments, **named))
    compiled, log = with_output(lambda: attend.lower(named, *arguments).compile())
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return assembled(log) | {
        "temp_bytes": analysis.temp_size_in_bytes,
        "cache_bytes": pages.size * pages.dtype.itemsize,
    }


def compile_product(case: ProductCase) -> dict[str, Any]:
    sharding = jax.sharding.SingleDeviceSharding(hopper.devices(1)[0])
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    x, row_scale = shape((case.tokens, 4096), jnp.bfloat16), shape((4096,), jnp.float32)
    weights = shape((4096 // 64, 4096 // 128, 2 * case.bits, 128), jnp.int32)
    scale = shape((4096 // 64, 4096 // case.group, 64), jnp.float16) if case.bits == 4 else None
    multiply = jax.jit(functools.partial(gpu_product.multiply, out_dtype=None, t=case.tuning, interpret=None))
    origin = shape(scale.shape, jnp.bfloat16) if case.whole_zeros and scale is not None else None
    arguments = x, weights, scale, scale if case.biases else None, origin, row_scale
    return assembled(with_output(lambda: multiply.lower(*arguments).compile())[1])


def compile_append(case: AppendCase) -> dict[str, Any]:
    sharding = jax.sharding.SingleDeviceSharding(hopper.devices(1)[0])
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    tokens, k, h = 16, case.num_kv_heads, case.head_dim
    table = shape((tokens, case.rotary_dim // 2), jnp.float32)
    norm = shape((h,), jnp.bfloat16) if case.norms else None
    arguments = [
        shape((tokens, k, case.group + 2, h), jnp.bfloat16),
        (table, table) if case.rotary_dim else None,
        shape((NUM_PAGES, k, 2, PAGE_SIZE, h), jnp.bfloat16),
        shape((tokens,), jnp.int32),
        norm,
        norm,
    ]
    append = functools.partial(rope_append, norm_eps=1e-5, norm_offset=1.0, q_rows=case.q_rows)
    lowered = jax.jit(lambda *x: append(*x), donate_argnums=2).lower(*arguments)
    compiled, log = with_output(lowered.compile)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return assembled(log) | {
        "alias_bytes": analysis.alias_size_in_bytes,
        "temp_bytes": analysis.temp_size_in_bytes,
        "cache_bytes": NUM_PAGES * k * 2 * PAGE_SIZE * h * 2,
    }


def compile_bucket(case: StepCase, dump: Path) -> dict[str, Any]:
    mesh = make_mesh(ParallelConfig(tensor=case.tensor), hopper.devices(case.tensor))
    start = time.perf_counter()
    with mock.patch.object(dispatch, "MOSAIC_GPU_CHECKED", dispatch.MOSAIC_GPU_CHECKED | {"kv int8", "kv fp8"}):
        lowered, params, state = described_step(mesh, case.bucket, max_loras=case.max_loras, cache_dtype=case.cache)
    lowered_at = time.perf_counter()
    if case.captures_collectives:
        options = {"xla_gpu_enable_command_buffer": f"{CAPTURED},COLLECTIVES"}
        compiled, log = with_output(lambda: lowered.compile(compiler_options=options))
    else:
        compiled, log = with_output(lambda: compile_step(lowered, mesh))
    compiled_at = time.perf_counter()
    [thunks] = dump.glob("*.thunk_sequence_after_thunk_passes.txt")
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None and text is not None
    instructions = hlo.entry(text)
    local = {name: x.sharding.shard_shape(x.shape) for name, x in params.items()}  # on one device
    matrices = {name: shape for name, shape in local.items() if len(shape) - name.startswith("layers.") > 1}
    values, _ = values_and_scales(state.kv_pages[0])
    pages = values.sharding.shard_shape(values.shape)
    sizes = [math.prod(shape) for shape in (*matrices.values(), pages)]

    def described(found: list[hlo.Instruction]) -> list[tuple[str, int]]:
        return [(f"{x.opcode} {x.name}", max(x.sizes)) for x in found]

    return assembled(log) | {
        "kernels_lowered": lowered.as_text().count(f"@{MOSAIC_CALL}"),
        "kernels_called": text.count(f'custom_call_target="{MOSAIC_CALL}"'),
        "alias_bytes": analysis.alias_size_in_bytes,
        "temp_bytes": analysis.temp_size_in_bytes,
        "layer_cache_bytes": sizes[-1] * values.dtype.itemsize,
        "opcodes": sorted({x.opcode for x in instructions}),
        "copies": described([x for x in instructions if x.opcode in ("copy", "copy-start", "transpose")]),
        "weight_readers": {
            name: described(hlo.readers(instructions, i)) for i, name in enumerate(local) if name in matrices
        },
        "weight_sized": described(hlo.made(instructions, sizes[:-1])),
        "cache_sized": described(hlo.made(instructions, sizes[-1:])),
        "launches": hlo.launches(thunks.read_text()),
        "lower_s": round(lowered_at - start, 2),
        "compile_s": round(compiled_at - lowered_at, 2),
    }


def main() -> None:
    out, dump, *names = sys.argv[1:]
    report = {}
    for name in names:
        case = (KERNELS | PRODUCTS | APPENDS | STEPS)[name]
        for path in Path(dump).glob("*"):  # what XLA dumped of the case before
            path.unlink()
        start = time.perf_counter()
        try:
            match case:
                case KernelCase():
                    report[name] = compile_kernel(case)
                case ProductCase():
                    report[name] = compile_product(case)
                case AppendCase():
                    report[name] = compile_append(case)
                case StepCase():
                    report[name] = compile_bucket(case, Path(dump))
        except Exception as e:  # belongs to this case's tests, not to all others'
            report[name] = {"error": f"{type(e).__name__}: {e}"}
        report[name]["seconds"] = round(time.perf_counter() - start, 2)
        print(f"{name}: {json.dumps(report[name], indent=1)}", flush=True)
    Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
