"""What every test shares. Imports nothing of jax, so that the host wing's tests start in milliseconds."""

import gc
import os
import signal
import tempfile

import pytest

from tests.device_guard import DeviceGuard

# Eight devices where there is no accelerator, so that every mesh of up to eight runs on one CPU. XLA reads this once,
# when its first client is made, hence here and not in a fixture. A GPU or TPU machine is not affected by it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# Many tests make engines of the same shapes: a step that took long to compile is compiled once a run, also where
# several processes share the run (pytest-xdist): their environment is their parent's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="jaxserve-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    # Tiny models are compiled for longer than they run: LLVM's optimizations, which are not ours, are left out. Of
    # XLA's two ways to make a CPU's code of a fusion, the one by MLIR takes a third of all other compiling, and parts
    # of a program for several threads take more together: left out, too, but not where LLVM optimizes, to which the
    # other way gives more to do. Tests of real models, on GPUs and of what ships elsewhere have all (tests/real_model,
    # tests/cli, below, tests/gpu_compile and tests/tpu_compile).
    if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
        os.environ["XLA_FLAGS"] += (
            " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
        )


# A shell starts its background jobs deaf to Ctrl-C, and they their children: tests interrupt commands.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    for device in ("cuda", "tpu"):
        parser.addoption(
            f"--require-{device}-compiler",
            action="store_true",
            help=f"fail, not skip, where the {device.upper()} compiler is not installed that tests need",
        )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(DeviceGuard())


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # a twentieth of the run went through what modules and traces are made of
    gc.set_threshold(50_000, 20, 20)
    if any(item.get_closest_marker("gpu") for item in session.items):  # those that are left to run
        import jax

        jax.config.update("jax_disable_most_optimizations", False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a GPU, and jax runs on {jax.devices()[0].device_kind}")
