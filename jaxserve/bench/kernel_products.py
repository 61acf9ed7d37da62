"""Products of a layer's shapes, and the ways to compute them: 4-bit and 8-bit matrices, and experts'."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.bench.ceilings import random_normal
from jaxserve.bench.kernel_cases import Case, Setting, Way, on_hopper
from jaxserve.bench.kernel_inputs import int4_matrix, int8_matrix
from jaxserve.bench.roofline import Work
from jaxserve.config import ModelConfig
from pallas_kernels import dispatch, grouped_matmul, int4_matmul, int8_matmul
from pallas_kernels.int4_matmul import gpu as hopper_int4
from pallas_kernels.int4_matmul.gpu_stream import Tuning
from pallas_kernels.int8_matmul import gpu as hopper_int8


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[F, D] of the matrices of a dense layer."""
    n, k, h, d, f = (
        config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size, config.intermediate_size,
    )  # fmt: skip
    found = {"qkv": ((n + 2 * k) * h, d), "out": (d, n * h)}
    if not all(config.is_moe(i) for i in range(config.num_layers)):
        up = {"gate_up": (2 * f, d)} if config.mlp == "gated" else {"up": (f, d)}
        found |= up | {"down": (d, f)}
    return found


def chain_of_products(multiply: Callable[[jax.Array, Any], jax.Array], x: jax.Array, weights: list[Any]) -> Any:
    """A program of ``multiply(x, w)`` for each of ``weights``, as ``Way.build`` returns it."""

    @jax.jit
    def chain(x: jax.Array, weights: list[Any]) -> list[jax.Array]:
        outs = []
        for w in weights:
            # An output is computed whole, and the next x depends on it: that it stays the same, XLA cannot know.
            outs.append(lax.optimization_barrier(multiply(x, w)))
            x = x + (outs[-1][0, 0] * 1e-30).astype(x.dtype)
        return outs

    return functools.partial(chain, x, weights)


def product_way(
    setting: Setting,
    implementation: str,
    selected: str,
    multiply: Callable[[jax.Array, Any], jax.Array],
    make: Callable[[int], Any],
    num_tokens: int,
    shape: tuple[int, int],
) -> Way:
    """``make(seed)`` makes a matrix [F, D] as ``multiply`` takes it."""
    f, d = shape
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make, 0)))
    copies = setting.num_copies(num_bytes)
    moved = num_bytes + num_tokens * (f + d) * setting.dtype.itemsize

    def build() -> Callable[[], Any]:
        x = random_normal(99, (num_tokens, d), setting.dtype)
        return chain_of_products(multiply, x, [make(i) for i in range(copies)])

    return Way(implementation, implementation == selected, Work(moved, 2.0 * num_tokens * f * d), build, copies)


def plain_product(setting: Setting, num_tokens: int, shape: tuple[int, int]) -> Way:
    """XLA's own, of a matrix that is not quantized, in the order that an engine keeps it in memory."""
    f, d = shape
    stored, axis = ((f, d), 1) if jax.default_backend() == "cpu" else ((d, f), 0)
    precision = lax.Precision.HIGHEST if setting.dtype == jnp.float32 else None

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(
            x, w, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=setting.dtype
        )

    def make(seed: Any) -> jax.Array:
        return random_normal(seed, stored, setting.dtype, d**-0.5)

    return product_way(setting, f"{setting.dtype.name} product", "", multiply, make, num_tokens, shape)


def quantized_cases(
    setting: Setting,
    name: str,
    kernel: Any,
    hopper: Any,
    about: Callable[[int], dict[str, Any]],
    refused: Any,
    **prepared: Any,
) -> Iterator[Case]:
    """Of int4 or int8. ``about`` of D: keywords of the matrix, or none; ``refused(F, D)``: why Hopper's does not;
    ``prepared``: keywords of the kernel's ``prepare``."""
    original = int4_matrix if kernel is int4_matmul else int8_matrix
    for matrix, (f, d) in matrices(setting.config).items():
        keywords = about(d)
        taken = setting.dtype == jnp.bfloat16 and refused(f, d) is None
        selected = dispatch.best_quantized_matmul(jax.devices()[0], hopper=name if taken else None)
        implementations: list[Any] = ["reference", "xla"] + (["mosaic_gpu"] if taken and on_hopper() else [])

        def make(seed: Any, implementation: Any, f: int = f, d: int = d, keywords: Any = keywords) -> Any:
            return kernel.prepare(original(f, d, **keywords, seed=seed), implementation=implementation, **prepared)

        for m in setting.batches:
            ways = []
            for implementation in implementations:
                multiply = functools.partial(getattr(kernel, name), implementation=implementation)
                made = functools.partial(make, implementation=implementation)
                ways.append(product_way(setting, implementation, selected, multiply, made, m, (f, d)))
            if "mosaic_gpu" in implementations and (tuning := setting.tuned(Tuning())):
                multiply = functools.partial(getattr(hopper, name), tuning=tuning)
                made = functools.partial(make, implementation="mosaic_gpu")
                ways.append(product_way(setting, "mosaic_gpu, tuned", "", multiply, made, m, (f, d)))
            ways.append(plain_product(setting, m, (f, d)))
            yield Case(name, {"matrix": matrix, "tokens": m} | keywords | prepared, ways)


def int4_cases(setting: Setting) -> Iterator[Case]:
    quantized = setting.config.quantization
    formats = [m.format for m in quantized.matrices if m.format.kind == "int4"] if quantized else []

    def about(num_inputs: int) -> dict[str, Any]:
        group = formats[0].group_size if formats else 128
        if group is None or num_inputs % group:  # the largest that the matrix divides into; or one scale a row
            group = next((g for g in reversed(hopper_int4.GROUPS) if num_inputs % g == 0), num_inputs)
        return {"group": group, "symmetric": not (formats and formats[0].has_bias)}

    def refused(f: int, d: int) -> str | None:
        return hopper_int4.refusal(f, d, d // about(d)["group"])

    whole_zeros = bool(formats) and formats[0].has_whole_zeros
    return quantized_cases(setting, "int4_matmul", int4_matmul, hopper_int4, about, refused, whole_zeros=whole_zeros)


def int8_cases(setting: Setting) -> Iterator[Case]:
    return quantized_cases(setting, "int8_matmul", int8_matmul, hopper_int8, lambda d: {}, lambda f, d: None)


def grouped_cases(setting: Setting) -> Iterator[Case]:
    """The experts' first product, of tokens that are spread over them at random."""
    moe, dtype = setting.config.moe, setting.dtype
    if moe is None:
        return
    shape = (
        moe.num_experts,
        (2 if setting.config.mlp == "gated" else 1) * moe.intermediate_size,
        (setting.config.hidden_size),
    )
    selected = dispatch.best_grouped_matmul(jax.devices()[0])
    for tokens in setting.batches:
        rows = tokens * moe.num_experts_per_tok
        drawn = np.random.default_rng(0).integers(0, moe.num_experts, rows)
        sizes = np.bincount(drawn, minlength=moe.num_experts)
        expert_bytes = shape[1] * shape[2] * dtype.itemsize
        num_bytes = int(np.count_nonzero(sizes)) * expert_bytes
        work = Work(num_bytes + rows * (shape[1] + shape[2]) * dtype.itemsize, 2.0 * rows * shape[1] * shape[2])
        copies = min(setting.num_copies(num_bytes), max(2, (4 << 30) // (expert_bytes * shape[0])))

        def build(name: Any, rows: int = rows, sizes: np.ndarray = sizes, copies: int = copies) -> Any:
            counts = jnp.asarray(sizes, jnp.int32)
            multiply = functools.partial(grouped_matmul.grouped_matmul, group_sizes=counts, implementation=name)
            weights = [random_normal(i, shape, dtype, shape[2] ** -0.5) for i in range(copies)]
            return chain_of_products(multiply, random_normal(99, (rows, shape[2]), dtype), weights)

        ways = [
            Way(name, name == selected, work, functools.partial(build, name), copies) for name in ("reference", "xla")
        ]
        yield Case("grouped_matmul", {"tokens": tokens, "rows": rows}, ways)
