"""Attention of a layer's shapes and what comes before it, rotation and append, and the ways to compute them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.bench.ceilings import random_normal
from jaxserve.bench.kernel_cases import Case, Setting, Way, on_hopper
from jaxserve.bench.kernel_inputs import attention_inputs, rope_append_inputs
from jaxserve.bench.roofline import Work, attention_pairs
from jaxserve.cache import pages
from jaxserve.execution.lowering import best_rope_append
from jaxserve.model import layers
from jaxserve.step_io import Bucket
from pallas_kernels import dispatch
from pallas_kernels import paged_attention as attention
from pallas_kernels import rope_append as rope
from pallas_kernels.paged_attention import gpu as hopper_attention
from pallas_kernels.paged_attention import gpu_decode, gpu_decode_quantized, gpu_prefill


def attention_program(
    setting: Setting,
    variant: dict[str, Any],
    decode_lens: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    num_calls: int,
    cache: str | None,
    attend: Callable[..., jax.Array],
) -> Callable[[], Any]:
    """Calls of ``attend`` with the keywords of ``paged_attention``; the output of each is the queries of the next.
    ``cache`` is a key of ``pages.NUMBERS``; None: pages of ``Setting.dtype``."""
    config = setting.config
    x = attention_inputs(
        decode_lens,
        chunks,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=setting.page_size,
        dtype=setting.dtype,
    )
    q, kv = x.pop("q"), x.pop("kv_pages")
    fixed = {name: x.pop(name) for name in ("num_decode_rows", "sm_scale")} | variant

    def stored(kv: jax.Array) -> dict[str, jax.Array]:
        if cache is None:
            return {"kv_pages": kv}
        numbers, scale = jax.jit(pages.rounded, static_argnums=1)(kv, pages.NUMBERS[cache])
        return {"kv_pages": numbers, "kv_scales": scale}

    held = [stored(kv), *(stored(random_normal(i, kv.shape, setting.dtype)) for i in range(1, num_calls))]

    @jax.jit
    def chain(q: jax.Array, held: list[dict[str, jax.Array]], x: dict[str, jax.Array]) -> jax.Array:
        for kv in held:
            q = attend(q=q, **kv, **x, **fixed)
        return q

    return functools.partial(chain, q, held, x)


def attention_cases(
    setting: Setting,
    kernel: str,
    batches: Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]],
    cache: str | None = None,
) -> Iterator[Case]:
    """For each of the model's windows and each of ``batches``, (decode rows' keys, chunks)."""
    for window in dict.fromkeys(setting.config.window(i) for i in range(setting.config.num_layers)):
        for decode_lens, chunks in batches:
            yield attention_case(setting, kernel, window, decode_lens, chunks, cache)


def attention_case(
    setting: Setting,
    kernel: str,
    window: int | None,
    decode_lens: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    cache: str | None = None,
) -> Case:
    config, dtype = setting.config, setting.dtype
    kv_dtype = dtype if cache is None else jnp.dtype(pages.NUMBERS[cache])
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    needs = hopper_attention.needs(
        head_dim=h, page_size=setting.page_size, k_heads=k, group=n // k, dtype=dtype, kv_dtype=kv_dtype,
        windows=(window,), softcap=config.attn_softcap, sinks=config.attn_sinks,
    )  # fmt: skip
    variant: dict[str, Any] = {"window": window, "softcap": config.attn_softcap}
    if config.attn_sinks:
        variant["sinks"] = random_normal(98, (n,), jnp.float32)
    rows = [(length - 1, 1) for length in decode_lens] + [(keys - new, new) for new, keys in chunks]
    pairs = sum(attention_pairs(start, new, window) for start, new in rows)
    seen = sum(start + new - (max(0, start - window + 1) if window else 0) for start, new in rows)
    vector_bytes = h * kv_dtype.itemsize + (0 if cache is None else pages.SCALE_DTYPE.itemsize)
    tokens, kv_bytes = sum(new for _, new in rows), seen * k * 2 * vector_bytes
    work = Work(kv_bytes + 2 * tokens * n * h * dtype.itemsize, 4.0 * n * h * pairs)
    num_calls = setting.num_copies(kv_bytes)

    selected = dispatch.best(jax.devices()[0], hopper=needs)
    names: list[Any] = ["reference"] + (["mosaic_gpu"] if on_hopper() and needs is not None else [])
    attends: dict[str, Callable[..., jax.Array]] = {
        name: functools.partial(attention.paged_attention, implementation=name) for name in names
    }
    if "mosaic_gpu" in names and (attend := tuned_attention(setting, not chunks, cache)):
        attends["mosaic_gpu, tuned"] = attend
    program = functools.partial(attention_program, setting, variant, decode_lens, chunks, num_calls, cache)
    ways = [
        Way(name, name == selected, work, functools.partial(program, attend), num_calls)
        for name, attend in attends.items()
    ]
    plain = window is None and config.attn_softcap is None and not config.attn_sinks
    plain = plain and cache is None
    if plain and len(set(rows)) == 1 and jax.default_backend() == "gpu" and dtype == jnp.bfloat16 and h <= 128:
        ways.append(dense_attention(setting, decode_lens, chunks, work, num_calls))
    about: dict[str, Any] = {"new_tokens": tokens} if chunks else {"rows": len(rows)}
    about |= {"keys": sum(start + new for start, new in rows), "window": window}
    if cache is not None:  # and what a cache that is not rounded takes
        whole = attention_case(setting, kernel, window, decode_lens, chunks)
        [way] = [way for way in whole.ways if way.is_selected]
        ways.append(way._replace(implementation=f"{dtype.name} cache, {way.implementation}", is_selected=False))
        about["cache"] = cache
    return Case(kernel, about, ways)


def tuned_attention(setting: Setting, decode: bool, cache: str | None) -> Callable[..., jax.Array] | None:
    """Hopper's kernel with ``Setting.tuning``, for keywords of ``paged_attention``; None if it has no such field."""
    kernel = gpu_decode if cache is None else gpu_decode_quantized
    head_dim, quantized = setting.config.head_dim, cache is not None
    default = kernel.default_tuning(head_dim) if decode else gpu_prefill.default_tuning(head_dim, quantized=quantized)
    tuning = setting.tuned(default)
    if tuning is None:
        return None

    def attend(*, prefill_cu_q_lens: jax.Array, num_decode_rows: int, **keywords: Any) -> jax.Array:
        if decode:
            return kernel.decode_attention(**keywords, tuning=tuning)
        return gpu_prefill.prefill_attention(**keywords, cu_q_lens=prefill_cu_q_lens, tuning=tuning)

    return attend


def dense_attention(
    setting: Setting, decode_lens: Sequence[int], chunks: Sequence[tuple[int, int]], work: Work, calls: int
) -> Way:
    """cuDNN's, of keys and values that lie one after another, without pages; rows have the same lengths."""
    config, dtype = setting.config, setting.dtype
    rows = [(1, length) for length in decode_lens] + list(chunks)
    new, keys = rows[0]

    def build() -> Callable[[], Any]:
        def normal(seed: int, tokens: int, heads: int) -> jax.Array:
            return random_normal(seed, (len(rows), tokens, heads, config.head_dim), dtype)

        held = [tuple(normal(2 * i + j, keys, config.num_kv_heads) for j in (0, 1)) for i in range(calls)]

        @jax.jit
        def chain(q: jax.Array, held: list[tuple[jax.Array, ...]]) -> jax.Array:
            for k, v in held:
                q = jax.nn.dot_product_attention(q, k, v, is_causal=new > 1, implementation="cudnn")
            return q

        return functools.partial(chain, normal(99, new, config.num_heads), held)

    return Way("cudnn, no pages", False, work, build, calls)


def decode_cases(setting: Setting) -> Iterator[Case]:
    return attention_cases(setting, "decode_attention", decode_batches(setting))


def quantized_decode_cases(setting: Setting) -> Iterator[Case]:
    """As ``decode_cases``, of a cache of each of the few-bit numbers, beside one that is not rounded."""
    for cache in pages.NUMBERS:
        yield from attention_cases(setting, "quantized_decode_attention", decode_batches(setting), cache)


def decode_batches(setting: Setting) -> list[tuple[list[int], tuple[()]]]:
    """Rows of the same length; and, as many as there are at most, of very different ones."""
    lens = [[setting.context] * rows for rows in setting.batches]
    if max(setting.batches) > 1:
        lens.append(uneven(max(setting.batches), setting.context))
    return [(x, ()) for x in lens]


def uneven(num_rows: int, mean: int) -> list[int]:
    """Log-normal lengths, and one row that is 16 times as long."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean), 1.2, num_rows - 1)
    return [16 * mean, *np.clip(drawn.astype(int), 1, 8 * mean).tolist()]


def prefill_cases(setting: Setting) -> Iterator[Case]:
    return attention_cases(setting, "prefill_attention", prefill_batches(setting))


def quantized_prefill_cases(setting: Setting) -> Iterator[Case]:
    """As ``quantized_decode_cases``."""
    for cache in pages.NUMBERS:
        yield from attention_cases(setting, "quantized_prefill_attention", prefill_batches(setting), cache)


def prefill_batches(setting: Setting) -> list[tuple[tuple[()], list[tuple[int, int]]]]:
    """Whole prompts, and the last quarter of the longest."""
    longest = max(setting.prompt_lens)
    chunks = [(n, n) for n in setting.prompt_lens] + [(max(1, longest // 4), longest)]
    return [((), [chunk]) for chunk in chunks]


# Rotation and append.

RopeAppend = Callable[..., tuple[jax.Array, jax.Array]]  # of the keywords of ``rope_append_inputs``, and ``kv_pages``


def rope_append_program(
    setting: Setting, shape: dict[str, Any], num_calls: int, norms: bool, rope_append: RopeAppend
) -> Callable[[], Any]:
    """Calls of ``rope_append`` on pages of their own, which are donated. ``shape``: of ``rope_append_inputs``."""
    x = rope_append_inputs(**shape, page_size=setting.page_size, norms=norms, dtype=setting.dtype)
    qkvs = [random_normal(i, x["qkv"].shape, setting.dtype) for i in range(num_calls)]
    del x["qkv"]
    pages_shape = (shape["num_pages"], shape["num_kv_heads"], 2, setting.page_size, shape["head_dim"])
    held = [jnp.zeros(pages_shape, setting.dtype) for _ in range(num_calls)]

    waits = "tables" if shape["rotary_dim"] else "write_index"  # one of them: a kernel of its own beside Hopper's

    @functools.partial(jax.jit, donate_argnums=1)
    def chain(qkvs: list[jax.Array], held: list[jax.Array], x: dict[str, Any]) -> Any:
        qs, out = [], []
        for qkv, kv_pages in zip(qkvs, held, strict=True):
            q, kv_pages = rope_append(qkv=qkv, kv_pages=kv_pages, **x)
            # The next call waits for this one's queries and pages: that what it gets stays the same, XLA cannot know.
            q = lax.optimization_barrier(q)
            zero = kv_pages[0, 0, 0, 0, 0].astype(jnp.float32) + q.ravel()[0].astype(jnp.float32) * 1e-30
            x = x | {waits: jax.tree.map(lambda a, z=zero: a + z.astype(a.dtype), x[waits])}
            qs, out = [*qs, q], [*out, kv_pages]
        return qs, out

    def run() -> Any:
        nonlocal held
        qs, held = chain(qkvs, held, x)
        return qs

    return run


def rope_append_cases(setting: Setting) -> Iterator[Case]:
    """``xla`` is what a layer does where no kernel is selected. A norm over all heads at once is left out."""
    config, dtype = setting.config, setting.dtype
    if config.qk_norm == "full":
        config = dataclasses.replace(config, qk_norm="none")
    k, h, group = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads
    kind = layers.layer_kind(config, 0)
    turning = None if kind.rope is None else config.ropes[kind.rope]
    rotary_dim = 0 if turning is None else turning.rotary_dim or h
    norms = config.qk_norm == "head"
    needs = layers.rope_append_needs(config, 1, dtype)
    names: list[Any] = ["reference"] + (["mosaic_gpu"] if on_hopper() and needs is not None else [])
    # Of decode rows: queries are laid out as attention's kernel reads them.
    q_rows = attention.query_rows(group, names[-1])
    fixed: dict[str, Any] = {"norm_eps": config.norm_eps, "norm_offset": config.norm_offset, "q_rows": q_rows}
    fixed["interleaved"] = turning is not None and turning.interleaved

    def by_xla(
        qkv: jax.Array, tables: Any, kv_pages: jax.Array, write_index: jax.Array, q_norm: Any, k_norm: Any
    ) -> tuple[jax.Array, jax.Array]:
        weights: Any = SimpleNamespace(q_norm=q_norm, k_norm=k_norm)
        rope = None if tables is None else (tables[0][:, None], tables[1][:, None])
        ropes: Any = tuple(rope for _ in config.ropes)
        unused: Any = None
        context = layers.AttentionContext(ropes, write_index, unused, unused, unused)
        q, kv_pages = layers.rotated(weights, kv_pages, qkv, context, config, kind)
        if q_rows is not None:
            q = jnp.pad(q.reshape(-1, k, group, h), ((0, 0), (0, 0), (0, q_rows - group), (0, 0)))
        return q, kv_pages

    calls: dict[str, RopeAppend] = {
        name: functools.partial(rope.rope_append, implementation=name, **fixed) for name in names
    }
    calls["xla"] = by_xla
    for tokens in setting.batches:
        bucket = Bucket(decode_rows=tokens, prefill_tokens=0, prefill_rows=0)
        selected = best_rope_append(jax.devices()[0], config, 1, dtype, bucket)
        moved = 2 * tokens * k * (group + 2) * h * dtype.itemsize + tokens * rotary_dim * 4
        work, num_calls = Work(moved, 3.0 * tokens * k * (group + 1) * rotary_dim), setting.num_copies(moved)
        num_pages = -(-(4 * tokens + 1) // setting.page_size) + 1
        shape = {"num_tokens": tokens, "num_kv_heads": k, "group": group, "head_dim": h, "rotary_dim": rotary_dim}
        program = functools.partial(rope_append_program, setting, shape | {"num_pages": num_pages}, num_calls, norms)
        ways = [
            Way(name, name == ("xla" if selected == "reference" else selected), work, functools.partial(program, call),
                num_calls)
            for name, call in calls.items()
        ]  # fmt: skip
        yield Case("rope_append", {"tokens": tokens}, ways)
