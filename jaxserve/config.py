"""Frozen configuration. Derived values are functions; nothing is edited after construction."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary embedding (Su et al., 2021) and the stretching of its frequencies.

    ``scaling`` and the fields that go with it, named as in Hugging Face configs:
        none: nothing.
        linear: positions divided by ``factor`` (Chen et al., 2023).
        llama3: low frequencies divided by ``factor``, high ones kept, between ``low_freq_factor`` and
            ``high_freq_factor`` wavelengths of ``original_max_position_embeddings`` interpolated.
        yarn: YaRN (Peng et al., 2023) with ``beta_fast``, ``beta_slow`` and ``truncate``.
        longrope: LongRoPE (Ding et al., 2024): each frequency divided by its entry of ``long_factor`` where the engine
            serves more than ``original_max_position_embeddings`` tokens, else of ``short_factor``.
    """

    theta: float = 10_000.0
    rotary_dim: int | None = None  # leading dimensions of a head that turn; None: all
    interleaved: bool = False  # pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the correction range is rounded outwards to whole dimensions
    attention_factor: float = 1.0  # on cos and sin; resolved by the reader of a checkpoint (yarn, longrope)
    short_factor: tuple[float, ...] = ()  # [rotary_dim / 2]
    long_factor: tuple[float, ...] = ()  # [rotary_dim / 2]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in place of the MLP, in the layers that ``ModelConfig.moe_layers`` marks.

    The router's scores are ``scoring`` over all experts; of them ``num_experts_per_tok`` are chosen, by the highest
    score plus ``correction_bias`` if there is one, within the ``topk_group`` best of ``num_groups`` groups. A group's
    score is the ``group_score`` of its experts: "max", or the sum of the two best ("top2", DeepSeek-V3).
    "softmax_topk" scores by softmax over the chosen logits alone (GPT-OSS).
    """

    num_experts: int  # E
    num_experts_per_tok: int
    intermediate_size: int  # F of one expert
    shared_intermediate_size: int = 0  # F of the shared expert; 0: there is none
    shared_gate: bool = False  # the shared expert's output is scaled by a sigmoid gate (Qwen2-MoE)
    scoring: Literal["softmax", "sigmoid", "softmax_topk"] = "softmax"
    norm_topk_prob: bool = False  # chosen scores are divided by their sum
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction_bias: bool = False
    router_bias: bool = False
    expert_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): pages hold one latent of ``kv_lora_rank +
    qk_rope_head_dim`` a token, shared by all heads."""

    q_lora_rank: int | None  # None: queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm_eps: float | None = None  # of the latents' norms; None: ModelConfig.norm_eps


@dataclass(frozen=True, kw_only=True)
class MatrixFormat:
    """How a matrix [..., out, in] of few bits lies in memory: numbers, and for each row and each group of input
    columns a scale (``model.quantized``).

    An int4 is unsigned and stands for ``scale * (q - 8)``, an int8 or fp8 (e4m3) for ``scale * q``; with a bias all
    stand for ``scale * q + bias``.
    """

    kind: Literal["int4", "int8", "fp8"]
    group_size: int | None = None  # input columns that share a scale; None: all of them
    has_bias: bool = False
    has_whole_zeros: bool = False  # int4: every bias is minus the scale times a whole zero point, of 0 to 16
    has_perm: bool = False  # GPTQ's act-order: input columns are sorted by group, ``perm`` says where they came from
    activations: Literal["none", "int8", "fp8"] = "none"  # what a product rounds its tokens to, by dynamic scales
    activation_group: int | None = None  # columns of a token that share a scale; None: all

    def __post_init__(self):
        if self.has_whole_zeros and (self.kind != "int4" or not self.has_bias):
            raise ValueError(f"MatrixFormat.has_whole_zeros is of int4 with biases, not of {self.kind}")
        for name in ("group_size", "activation_group"):
            value = getattr(self, name)
            if value is not None and (value < 1 or (self.kind == "int4" and value % 2)):
                least = "even and positive" if self.kind == "int4" else "positive"
                raise ValueError(f"MatrixFormat.{name}={value} must be {least}")


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrices:
    """Parameters that have one format, by name: "layers.3.qkv"."""

    format: MatrixFormat
    parameters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Which parameters are quantized, and how; all others are in the model's dtype.

    ``method`` is what a checkpoint calls it (gptq, awq, fp8, compressed-tensors, gguf); nothing computed depends on it.
    """

    method: str
    matrices: tuple[QuantizedMatrices, ...] = ()

    def __post_init__(self):
        names = [name for matrices in self.matrices for name in matrices.parameters]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"QuantizationConfig gives {twice} two formats")

    def __str__(self) -> str:
        """For people: the formats and how many parameters have each."""
        texts = []
        for matrices in self.matrices:
            f = matrices.format
            parts = [f.kind, f"groups of {f.group_size}" if f.group_size else "a scale a row"]
            parts += ["biases"] * f.has_bias + ["act-order"] * f.has_perm
            parts += [f"{f.activations} activations"] * (f.activations != "none")
            texts.append(
                f"{len(matrices.parameters)} of {' with '.join(parts[:2])}{''.join(f', {p}' for p in parts[2:])}"
            )
        return f"{self.method}: {'; '.join(texts)}"

    def formats(self) -> dict[str, MatrixFormat]:
        """Format by parameter."""
        return {name: matrices.format for matrices in self.matrices for name in matrices.parameters}


PER_LAYER = ("layer_windows", "layer_ropes", "moe_layers")  # fields of a model with an entry for each layer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder is: families are flags of this one dataclass, never subclasses.

    Sizes are those of the checkpoint, before any padding for a mesh. ``eos_token_ids`` are the ids that end a
    generation unless the request says ``ignore_eos``. Per-layer tuples are empty or have ``num_layers`` entries.
    """

    family: str = "llama"  # a key of the checkpoint tables; nothing in the decoder depends on it
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    # Norms.
    norm: Literal["rms", "layer"] = "rms"  # "layer": mean subtracted, with a bias
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to the stored weight: 1 for Gemma
    pre_norm: bool = True  # before attention and MLP; False for OLMo-2
    post_norm: bool = False  # on their outputs, before the residual addition (Gemma 2 and 3, OLMo-2)
    # Attention.
    qkv_bias: bool = False
    attn_out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head (Qwen3, Gemma 3), or all heads at once (OLMo-2)
    attn_scale: float | None = None  # on the scores; None: head_dim ** -0.5
    attn_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    attn_sinks: bool = False  # a learned logit a head that takes part in the softmax and has no value (GPT-OSS)
    layer_windows: tuple[int | None, ...] = ()  # keys a query sees, its own included; None: all. Empty: all layers all
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    layer_ropes: tuple[int | None, ...] = ()  # index into ropes; None: no rotary embedding. Empty: all layers 0
    learned_positions: bool = False  # an embedding of positions is added (GPT-2)
    mla: MLAConfig | None = None
    # MLP.
    mlp: Literal["gated", "plain"] = "gated"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"] = "silu"  # swiglu_oai: GPT-OSS's clamped
    mlp_bias: bool = False
    moe: MoEConfig | None = None
    moe_layers: tuple[bool, ...] = ()  # empty: all layers, if there is a moe
    # Scales.
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # on the outputs of attention and MLP (Granite)
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    quantization: QuantizationConfig | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        for rope in self.ropes:
            dim = self.rope_dim if rope.rotary_dim is None else rope.rotary_dim
            if dim % 2:
                name = "head_dim" if rope.rotary_dim is None else "rotary_dim"
                raise ValueError(f"{name}={dim} must be even: rotary embedding rotates pairs")
        for name in PER_LAYER:
            if len(getattr(self, name)) not in (0, self.num_layers):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, num_layers={self.num_layers}")
        for rope in self.layer_ropes:
            if rope is not None and not 0 <= rope < len(self.ropes):
                raise ValueError(f"layer_ropes has {rope}, there are {len(self.ropes)} ropes")
        for window in self.layer_windows:
            if window is not None and window < 1:
                raise ValueError(f"layer_windows has {window}: a query sees at least itself")

    def window(self, layer: int) -> int | None:
        """Keys that a query of ``layer`` sees, its own included; None: all."""
        return self.layer_windows[layer] if self.layer_windows else None

    def rope(self, layer: int) -> int | None:
        """Index into ``ropes`` of ``layer``; None where positions do not turn its heads."""
        return self.layer_ropes[layer] if self.layer_ropes else (0 if self.ropes else None)

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that rotary embedding may turn: of MLA's heads, those that are no latent."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` has experts instead of an MLP."""
        return self.moe is not None and (self.moe_layers[layer] if self.moe_layers else True)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of K and V (or of the latent) that one token of context holds over all layers, ``itemsize`` bytes an
        element."""
        if self.mla is not None:
            return self.num_layers * (self.mla.kv_lora_rank + self.mla.qk_rope_head_dim) * itemsize
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Mesh axis sizes, in the order of the mesh: ``("stage", "tensor")``; and how many such meshes there are, each
    with a copy of the weights, pages and a scheduler of its own."""

    stage: int = 1  # ST
    tensor: int = 1
    replica: int = 1

    @property
    def num_devices(self) -> int:
        """Of all replicas."""
        return self.replica * self.stage * self.tensor

    def __str__(self) -> str:
        """As users write it."""
        replicas = "" if self.replica == 1 else f"replica={self.replica},"
        return f"{replicas}stage={self.stage},tensor={self.tensor}"


CacheDtype = Literal["auto", "int8", "fp8"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Room for adapters of low rank beside the base model, on the device: ``model.lora``."""

    max_loras: int  # LA: adapters that are loaded at once
    max_rank: int = 16  # LR

    def __post_init__(self):
        for name, value in (("max_loras", self.max_loras), ("max_lora_rank", self.max_rank)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache. ``allocation="static"`` reserves ``max_model_len`` a sequence: the benchmark's comparison.

    ``dtype``: "auto" keeps K and V as they are computed; int8 and fp8 (e4m3) round each head's key and value of a token
    with a scale of their own.
    """

    num_pages: int  # NP
    page_size: int = 16  # PS, tokens
    prefix_caching: bool = True
    allocation: Literal["paged", "static"] = "paged"
    dtype: CacheDtype = "auto"

    def __post_init__(self):
        if self.page_size < 1:
            raise ValueError(f"page_size={self.page_size} must be at least 1")
        if self.num_pages < 1:
            raise ValueError(f"num_pages={self.num_pages} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine's scheduler.

    ``decode_sizes`` and ``prefill_sizes`` are the padded sizes a step may take (see ``step_io.Bucket``): ascending,
    the last decode size equal to ``max_num_seqs``, the last prefill size more than that: a step that reads prompts has
    the tokens of all that decode, too. At most ``max_prefill_rows`` sequences have a prompt chunk in a
    step. ``batching="static"`` admits only into an empty batch: the benchmark's comparison.

    ``lookahead=1``: a step is dispatched before the last one is read, and follows it into the ``num_stages`` stages of
    the mesh as soon as that has left the first. ``lookahead=0``: each step is read before the next is scheduled.
    ``lookahead=2``: without stages, a second step that only decodes is dispatched ahead as long as the device would
    else wait for the host. Who comes then waits for one short step more.
    """

    max_model_len: int  # tokens, prompt and output together
    max_num_seqs: int  # R
    prefill_sizes: tuple[int, ...]  # tokens of a step that reads prompts, e.g. (64, 256)
    decode_sizes: tuple[int, ...]  # decode rows a step, e.g. (1, 8)
    max_prefill_rows: int = 4
    max_num_waiting: int = 1024
    lookahead: Literal[0, 1, 2] = 1
    num_stages: int = 1  # ST
    batching: Literal["continuous", "static"] = "continuous"

    def __post_init__(self):
        for name in ("prefill_sizes", "decode_sizes"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name}={sizes} must be ascending positive sizes")
        if self.decode_sizes[-1] != self.max_num_seqs:
            raise ValueError(f"decode_sizes ends with {self.decode_sizes[-1]}, max_num_seqs={self.max_num_seqs}")
        if self.prefill_sizes[-1] <= self.max_num_seqs:
            raise ValueError(
                f"prefill_sizes ends with {self.prefill_sizes[-1]}, which must be more than max_num_seqs="
                f"{self.max_num_seqs}: a step that reads prompts has the tokens of all that decode, too"
            )
        if self.lookahead not in (0, 1, 2):
            raise ValueError(f"lookahead={self.lookahead} is not one of 0, 1, 2")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} must be at least 1")
        if self.max_prefill_rows < 1 or self.max_num_waiting < 1 or self.max_model_len < 2:
            raise ValueError(
                f"max_prefill_rows={self.max_prefill_rows} and max_num_waiting={self.max_num_waiting} must be at "
                f"least 1, max_model_len={self.max_model_len} at least 2"
            )

    @property
    def num_shares(self) -> int:
        """Steps that are in the stages at once, over which the sequences that decode are shared out."""
        return self.num_stages if self.lookahead else 1

    def max_pages_per_seq(self, page_size: int) -> int:
        """MP: pages that a sequence of ``max_model_len`` tokens holds."""
        return -(-self.max_model_len // page_size)
