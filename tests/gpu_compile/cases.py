"""What is compiled: every kernel variant once, and the step of an 8B model on one, two and four devices."""

from typing import NamedTuple

from jaxserve.config import CacheDtype
from jaxserve.step_io import Bucket
from pallas_kernels.int4_matmul.gpu_stream import Tuning as ProductTuning
from pallas_kernels.paged_attention.gpu_prefill import Tuning as PrefillTuning
from pallas_kernels.paged_attention.gpu_split import Tuning


class KernelCase(NamedTuple):
    """One attention kernel at one shape."""

    tuning: Tuning | PrefillTuning
    rows: int = 32  # B
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    cache: str | None = None  # numbers of the cache, "int8" or "fp8"; None: bfloat16
    spilled_bytes: int = 0  # of registers, at most
    refused: str = ""  # what the compiler's error must say


class ProductCase(NamedTuple):
    """A product of [tokens, 4096] with a packed matrix [4096, 4096]."""

    tokens: int
    bits: int = 4
    group: int = 128
    biases: bool = False
    whole_zeros: bool = False
    tuning: ProductTuning = ProductTuning()
    spilled_bytes: int = 0


class AppendCase(NamedTuple):
    """Rotation and append of 16 tokens."""

    num_kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    rotary_dim: int = 128
    norms: bool = False
    q_rows: int | None = 8


class StepCase(NamedTuple):
    """One bucket's step."""

    tensor: int
    bucket: Bucket
    captures_collectives: bool = False  # compiled with an option that the engine does not set
    cache: CacheDtype = "auto"
    max_loras: int = 0  # adapters that its tokens may have
    rope_append: bool = False  # that rotation and append are expected to be one kernel


PREFILL_SPILLS = 20  # bytes a thread: timed on an H100, tiles of 128 keys that spill this are faster than of 64
KERNELS = {
    "decode": KernelCase(Tuning()),
    "decode-page-32": KernelCase(Tuning(), page_size=32),
    "decode-page-64": KernelCase(Tuning(), page_size=64),
    "decode-20-heads-of-1": KernelCase(Tuning(), rows=1, num_heads=20, num_kv_heads=1),
    "decode-3-heads-of-64": KernelCase(Tuning(), num_heads=9, num_kv_heads=3, head_dim=64),
    "decode-8-heads-of-64": KernelCase(Tuning(), num_heads=64, head_dim=64),
    "decode-too-large-a-ring": KernelCase(Tuning(ring=8), refused="shared memory"),
    "prefill": KernelCase(PrefillTuning(), rows=4, spilled_bytes=PREFILL_SPILLS),
    "prefill-3-heads-of-64": KernelCase(
        PrefillTuning(), rows=4, num_heads=9, num_kv_heads=3, head_dim=64, spilled_bytes=PREFILL_SPILLS
    ),
}

# Of a quantized cache.
QUANTIZED = {
    "int8": KernelCase(Tuning(), cache="int8"),
    "fp8": KernelCase(Tuning(), cache="fp8"),
    "int8-page-128-of-64": KernelCase(Tuning(), page_size=128, head_dim=64, cache="int8"),
    "fp8-window-sinks-of-64": KernelCase(
        Tuning(), rows=8, num_heads=64, head_dim=64, window=128, sinks=True, cache="fp8"
    ),
    "int8-page-32-window-softcap": KernelCase(
        Tuning(), rows=8, num_kv_heads=16, page_size=32, window=4096, softcap=50.0, cache="int8"
    ),
    "fp8-32-heads-of-1": KernelCase(Tuning(), rows=1, num_kv_heads=1, cache="fp8"),
}
for _name, _case in QUANTIZED.items():
    KERNELS[f"decode-{_name}"] = _case
    KERNELS[f"prefill-{_name}"] = _case._replace(tuning=PrefillTuning(), spilled_bytes=8)

# What Mistral, GPT-OSS, Gemma 2 27B and Phi-3 need; spills of decode, of prefill. Not heads of 256, nor other tunings:
# what no engine chooses is not compiled at each run (``scripts/test_gpu.sh`` has the former).
VARIANTS: dict[str, tuple[KernelCase, int, int]] = {
    "page-128": (KernelCase(Tuning(), rows=8, page_size=128), 0, PREFILL_SPILLS),
    "window": (KernelCase(Tuning(), rows=8, window=4096), 0, PREFILL_SPILLS),
    "window-sinks-of-64": (
        KernelCase(Tuning(), rows=8, num_heads=64, head_dim=64, window=128, sinks=True), 0, 48,
    ),
    "window-softcap": (KernelCase(Tuning(), rows=8, num_kv_heads=16, window=4096, softcap=50.0), 0, 24),
    "heads-of-96-window": (KernelCase(Tuning(), rows=8, num_kv_heads=32, head_dim=96, window=2047), 0, 0),
}  # fmt: skip
for _name, (_case, _decode, _prefill) in VARIANTS.items():
    KERNELS[f"decode-{_name}"] = _case._replace(spilled_bytes=_decode)
    KERNELS[f"prefill-{_name}"] = _case._replace(tuning=PrefillTuning(), spilled_bytes=_prefill)

PRODUCTS = {
    "int4-1-token": ProductCase(1),
    "int4-16-tokens-biases": ProductCase(16, biases=True),
    "int4-16-tokens-groups-of-32-biases": ProductCase(16, group=32, biases=True),
    "int4-64-tokens-groups-of-64": ProductCase(64, group=64),
    "int4-64-tokens-biases": ProductCase(64, biases=True, spilled_bytes=16),
    "int4-1-token-zeros": ProductCase(1, whole_zeros=True),
    "int4-64-tokens-zeros": ProductCase(64, whole_zeros=True),
    "int4-64-tokens-groups-of-32-zeros": ProductCase(64, group=32, whole_zeros=True, spilled_bytes=12),
    "int4-512-tokens-zeros": ProductCase(512, whole_zeros=True),
    "int4-dequantized-zeros": ProductCase(1024, group=64, whole_zeros=True),
    "int4-512-tokens-whole-blocks": ProductCase(512),
    "int4-dequantized-biases": ProductCase(1024, biases=True),
    "int8-16-tokens": ProductCase(16, bits=8),
    "int8-64-tokens": ProductCase(64, bits=8),
    "int8-dequantized": ProductCase(1024, bits=8),
}

APPENDS = {
    "append": AppendCase(),
    "append-for-prompts": AppendCase(q_rows=None),
    "append-1-head": AppendCase(num_kv_heads=1, group=8),
    "append-8-heads-of-64": AppendCase(group=8, head_dim=64, rotary_dim=64),
    "append-3-heads-of-64": AppendCase(num_kv_heads=3, group=3, head_dim=64, rotary_dim=64),
    "append-heads-of-256-norms": AppendCase(num_kv_heads=8, group=2, head_dim=256, rotary_dim=256, norms=True),
    "append-heads-of-96": AppendCase(num_kv_heads=32, group=1, head_dim=96, rotary_dim=96),
    "append-part-turns-norms": AppendCase(num_kv_heads=4, group=8, rotary_dim=64, norms=True),
    "append-nothing-turns": AppendCase(rotary_dim=0),
}

DECODE, PREFILL, MIXED = Bucket(32, 0, 0), Bucket(0, 512, 16), Bucket(32, 512, 16)
STEPS = {
    f"tensor-{tensor}-{name}": StepCase(tensor, bucket)
    for tensor in (1, 2, 4)
    for name, bucket in (("decode", DECODE), ("mixed", MIXED))
    if (tensor, name) != (2, "mixed")  # as on one and on four
}
STEPS["tensor-1-prefill"] = StepCase(1, PREFILL)
STEPS["tensor-8-decode"] = StepCase(8, DECODE)  # a whole host
STEPS["tensor-1-decode-loras"] = StepCase(1, DECODE, max_loras=4)
STEPS |= {f"tensor-{tensor}-many-rows": StepCase(tensor, Bucket(128, 0, 0), rope_append=True) for tensor in (1, 2)}
STEPS["tensor-1-mixed-int8-cache"] = StepCase(1, MIXED, cache="int8")
STEPS["tensor-2-decode-fp8-cache"] = StepCase(2, DECODE, cache="fp8")
STEPS["tensor-1-one-row"] = StepCase(1, Bucket(1, 0, 0))
STEPS["tensor-2-decode-collectives-captured"] = StepCase(2, DECODE, captures_collectives=True)
