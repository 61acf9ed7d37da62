"""Compiles the attention kernels for Hopper without a GPU, and reports what the assembler says of each variant.

Needs the CUDA wheels and no driver (1.4 GB; a virtual environment of its own):

    pip install jax==0.11.2 absl-py flatbuffers
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc nvidia-nvvm \\
        nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvjitlink
    JAX_PLATFORMS=cpu MOSAIC_GPU_DUMP_PTXAS=1 XLA_FLAGS=--xla_gpu_autotune_level=0 \\
        python -m benchmarks.kernels.compile_hopper

Exits with 1 if registers are spilled; too much shared memory is an error of the compiler.
"""

import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.paged_attention.gpu_decode import decode_attention
from pallas_kernels.paged_attention.gpu_prefill import Tuning as PrefillTuning
from pallas_kernels.paged_attention.gpu_prefill import prefill_attention
from pallas_kernels.paged_attention.gpu_split import Tuning

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024 thread_dim_limit_z: 64 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a" device_address_bits: 64 name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# rows, query heads, kv heads, head_dim, page size, and what is not as by default
DECODE: tuple[tuple[int, int, int, int, int, dict[str, Any]], ...] = (
    (32, 32, 8, 128, 16, {}),
    (32, 32, 8, 128, 32, {}),
    (32, 32, 8, 128, 64, {}),
    (1, 20, 1, 128, 16, {}),
    (32, 9, 3, 64, 16, {}),
    (32, 64, 8, 64, 16, {}),
    (32, 32, 8, 128, 16, {"tuning": Tuning(launch_early=True)}),
    (32, 32, 8, 128, 16, {"tuning": Tuning(streams_per_sm=1, ring=10)}),
)
PREFILL: tuple[tuple[int, int, int, int, int, dict[str, Any]], ...] = (
    (4, 32, 8, 128, 16, {}),
    (4, 32, 8, 128, 16, {"tuning": PrefillTuning(block_kv=64, ring=10)}),
    (4, 9, 3, 64, 16, {}),
)
# Of both kernels: Mistral, GPT-OSS, Gemma 2 27B, Gemma 2 9B and Gemma 3, Phi-3.
VARIANTS: tuple[tuple[int, int, int, int, int, dict[str, Any]], ...] = (
    (8, 32, 8, 128, 128, {}),
    (8, 32, 8, 128, 16, {"window": 4096}),
    (8, 64, 8, 64, 16, {"window": 128, "sinks": True}),
    (8, 32, 16, 128, 16, {"window": 4096, "softcap": 50.0}),
    (8, 16, 8, 256, 16, {}),
    (8, 16, 8, 256, 16, {"window": 4096, "softcap": 50.0, "sinks": True}),
    (8, 4, 1, 256, 128, {"window": 512}),
    (8, 32, 32, 96, 16, {"window": 2047}),
)
CHUNK_TOKENS = 512


def assembler_report(lowered: jax.stages.Lowered) -> str:
    """What compiling writes to the process's own output: the assembler is not in Python."""
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            lowered.compile()
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
        log.seek(0)
        return log.read().decode()


def _with_sinks(kernel: Callable[..., jax.Array], changes: dict[str, Any], *arguments: jax.Array) -> jax.Array:
    return kernel(*arguments[:-1], **(changes | {"sinks": arguments[-1]}))


def main() -> None:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    failed = False
    for kernel, variants in ((decode_attention, DECODE + VARIANTS), (prefill_attention, PREFILL + VARIANTS)):
        for b, n, k, h, page_size, changes in variants:
            tokens = b if kernel is decode_attention else CHUNK_TOKENS
            arguments = [
                shape((tokens, n, h), jnp.bfloat16),
                shape((4096, k, 2, page_size, h), jnp.bfloat16),
                shape((b, 4096 // page_size), jnp.int32),
                shape((b,), jnp.int32),
            ]
            if kernel is prefill_attention:
                arguments.append(shape((b + 1,), jnp.int32))
            f = functools.partial(kernel, sm_scale=h**-0.5, **(changes | {"sinks": None}))
            if "sinks" in changes:  # the last argument
                arguments.append(shape((n,), jnp.float32))
                f = functools.partial(_with_sinks, functools.partial(kernel, sm_scale=h**-0.5), changes)
            report = assembler_report(jax.jit(f).lower(*arguments))
            spilled = [int(x) for x in re.findall(r"(\d+) bytes spill stores", report)]
            registers = [int(x) for x in re.findall(r"Used (\d+) registers", report)]
            failed |= not spilled or any(spilled)
            name = "decode" if kernel is decode_attention else "prefill"
            print(f"{name} {n}/{k}x{h} page {page_size} {changes or ''}: registers {registers}, "
                  f"spilled bytes {spilled}", flush=True)  # fmt: skip
    sys.exit(failed)


if __name__ == "__main__":
    main()
