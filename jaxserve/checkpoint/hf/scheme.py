"""The ``quantization_config`` of a config.json: what it says of its matrices, or why they cannot be served.

As everywhere in a config.json, each key is used, known to change nothing, or refused by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.config_keys import ConfigKeys
from jaxserve.checkpoint.json_file import shown
from jaxserve.config import MatrixFormat

WHERE = "quantization_config."
# How a tool quantized, and what it would run with: nothing of it changes what the tensors say.
NEUTRAL = frozenset({
    "quant_method", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "model_name_or_path",
    "model_file_base_name", "meta", "backend", "block_name_to_quantize", "module_name_preceding_first_block", "dataset",
    "tokenizer", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs", "model_seqlen",
    "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "mse", "act_group_aware", "offload_to_disk",
    "offload_to_disk_path", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "modules_in_block_to_quantize",
    "lm_head", "quantization_status", "global_compression_ratio", "run_compressed", "packed_modules_mapping",
})  # fmt: skip
ARGS_NEUTRAL = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the quantized modules of a checkpoint are stored. Which they are, its tensors say.

    Attributes:
        method: ``quant_method``.
        layout: a key of ``quantized_module.LAYOUTS``.
        group_size: input columns that share a scale; None: one scale a row. FP8 in blocks: their columns.
        block_rows: rows that share scales (FP8 in blocks).
        symmetric: there are no zero points, or all are in the middle.
        zero_offset: what is added to stored zero points (GPTQ's first format subtracted 1).
        is_sorted: g_idx may be anything (``desc_act``).
        excluded: whether the config leaves a module of this name unquantized.
    """

    method: str
    layout: Literal["gptq", "awq", "packed", "plain"]
    kind: Literal["int4", "int8", "fp8"]
    group_size: int | None
    block_rows: int | None = None
    symmetric: bool = True
    zero_offset: int = 0
    is_sorted: bool = False
    activations: Literal["none", "int8", "fp8"] = "none"
    activation_group: int | None = None
    excluded: Callable[[str], bool] = field(default=lambda name: False, compare=False)

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    def matrix_format(self, *, has_perm: bool = False) -> MatrixFormat:
        return MatrixFormat(
            kind=self.kind,
            group_size=self.group_size,
            has_bias=not self.symmetric,
            has_whole_zeros=not self.symmetric and self.kind == "int4",
            has_perm=has_perm,
            activations=self.activations,
            activation_group=self.activation_group,
        )


def read_scheme(values: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config.json; None where it has no ``quantization_config``.

    Raises:
        CheckpointError: it is not one that we serve; names the key and its value.
    """
    quantization = values.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(quantization, dict) or not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        raise CheckpointError(f"quantization_config with quant_method={shown(method)} is not supported, only {known}")
    keys = ConfigKeys(quantization, WHERE, renamed=RENAMED)
    scheme = METHODS[method](keys)
    keys.refuse_rest(NEUTRAL)
    return scheme


RENAMED = {"w_bit": "bits", "q_group_size": "group_size", "ignored_layers": "modules_to_not_convert"}


def _gptq(keys: ConfigKeys) -> Scheme:
    bits = _bits(keys)
    keys.only("is_marlin_format", False)
    keys.only("pack_dtype", "int32")
    keys.only("adapter")
    formats = {keys.take(key) for key in ("checkpoint_format", "format") if keys.take(key) is not None}
    if len(formats) > 1 or not formats <= {"gptq", "gptq_v2"}:
        raise CheckpointError(
            f"{WHERE}checkpoint_format={' and '.join(sorted(map(repr, formats)))} is not supported, only 'gptq' or "
            "'gptq_v2'"
        )
    return Scheme(
        method="gptq",
        layout="gptq",
        kind="int4" if bits == 4 else "int8",
        group_size=_group_size(keys),
        symmetric=keys.flag("sym", True),
        zero_offset=0 if formats == {"gptq_v2"} else 1,
        is_sorted=keys.flag("desc_act"),
        excluded=_dynamic(keys),
    )


def _dynamic(keys: ConfigKeys) -> Callable[[str], bool]:
    """GPTQModel's rules by module name: a negative one excludes; others change bits or groups."""
    rules = keys.take("dynamic") or {}
    if not isinstance(rules, dict):
        raise keys.error("dynamic", rules, "an object of rules")
    patterns = []
    for rule in rules:
        if not rule.startswith("-:"):
            raise CheckpointError(f"{WHERE}dynamic has {shown(rule, 120)}: modules with settings of their own are not "
                                  "supported, only '-:' rules, which exclude")  # fmt: skip
        patterns.append(_pattern(rule[2:], "dynamic"))
    return lambda name: any(p.match(name) for p in patterns)


def _awq(keys: ConfigKeys) -> Scheme:
    _bits(keys, 4)
    for key in ("version", "format"):
        if isinstance(keys.take(key), str) and keys.take(key).lower() == "gemm":
            continue
        keys.only(key, "gemm")
    keys.only("zero_point", True)
    keys.only("desc_act", False)
    keys.take("sym")  # of a class that AWQ's inherits; its zero points are always stored
    excluded = _names(keys, "modules_to_not_convert")
    return Scheme(
        method="awq", layout="awq", kind="int4", group_size=_group_size(keys), symmetric=False, excluded=excluded
    )


def _fp8(keys: ConfigKeys) -> Scheme:
    keys.only("activation_scheme", "dynamic")  # static: a scale of the input in the checkpoint
    keys.only("fmt", "e4m3")
    keys.only("scale_fmt", "float")
    keys.only("expert_dtype", "fp8")
    keys.only("modules_to_convert")
    keys.only("dequantize", False)
    keys.only("kv_cache_scheme")
    block = _block(keys, "weight_block_size")
    return Scheme(
        method="fp8",
        layout="plain",
        kind="fp8",
        group_size=block and block[1],
        block_rows=block and block[0],
        activations="fp8",
        activation_group=block and block[1],
        excluded=_names(keys, "modules_to_not_convert"),
    )


def _compressed(keys: ConfigKeys) -> Scheme:
    keys.only("kv_cache_scheme")
    keys.only("moe_sparsity_config")
    keys.take("version")
    for key in ("sparsity_config", "transform_config"):
        value = keys.take(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise CheckpointError(f"{WHERE}{key}={shown(value)} is not supported")
    layout_name = keys.take("format")
    if layout_name not in COMPRESSED:
        raise CheckpointError(f"{WHERE}format={shown(layout_name)} is not supported, only {', '.join(COMPRESSED)}")
    groups = keys.take("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise keys.error("config_groups", groups, "an object of at least one group")
    excluded = _names(keys, "ignore")
    schemes = {name: _group(name, group, layout_name, excluded) for name, group in groups.items()}
    first, *others = schemes.items()
    for name, scheme in others:
        if scheme != first[1]:
            raise CheckpointError(
                f"{WHERE}config_groups: {shown(name)} is quantized otherwise than {shown(first[0])}: mixed bits or "
                "layouts are not supported"
            )
    return first[1]


COMPRESSED: dict[str, tuple[Literal["packed", "plain"], tuple[str, ...]]] = {
    "pack-quantized": ("packed", ("int4", "int8")),
    "int-quantized": ("plain", ("int8",)),
    "float-quantized": ("plain", ("fp8",)),
    "naive-quantized": ("plain", ("int8", "fp8")),
}  # compressed-tensors' format -> layout, and the kinds of numbers that it may have


KINDS: dict[tuple[Any, Any], Literal["int4", "int8", "fp8"]] = {
    (4, "int"): "int4",
    (8, "int"): "int8",
    (8, "float"): "fp8",
}  # bits and type of numbers


def _group(name: str, group: Any, layout_name: str, excluded: Callable[[str], bool]) -> Scheme:
    where = f"{WHERE}config_groups.{name}."
    if not isinstance(group, dict):
        raise CheckpointError(f"{where[:-1]}={shown(group)}: expected an object")
    keys = ConfigKeys(group, where)
    keys.take("targets")  # the tensors say which modules they are
    keys.only("output_activations")
    keys.only("format", layout_name)
    given, inputs = keys.take("weights"), keys.take("input_activations")
    keys.refuse_rest()
    if not isinstance(given, dict):
        raise keys.error("weights", given, "an object")
    weights = ConfigKeys(given, f"{where}weights.")
    bits, number = weights.take("num_bits", 8), weights.take("type", "int")
    kind = KINDS.get((bits, number))
    layout, kinds = COMPRESSED[layout_name]
    if kind is None or kind not in kinds:
        raise CheckpointError(
            f"{where}weights: num_bits={shown(bits)} of type {shown(number)} as {layout_name} is not supported"
        )
    weights.only("dynamic", False)
    symmetric = weights.flag("symmetric", True)
    if kind == "fp8" and not symmetric:
        raise weights.error("symmetric", False, "true for numbers of type float")
    strategy, size = weights.take("strategy"), weights.take("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    block = _block(weights, "block_structure")
    order = weights.take("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic"):
        raise weights.error("actorder", order, "null, weight or group")
    if strategy == "group":
        group_size: int | None = weights.size("group_size")
    elif strategy == "block" and kind == "fp8" and block is not None:
        group_size = block[1]
    elif strategy in ("tensor", "channel"):
        group_size = None
    else:
        raise weights.error("strategy", strategy, "tensor, channel, group, or block for numbers of type float")
    weights.refuse_rest(ARGS_NEUTRAL)
    activations, activation_group = _inputs(inputs, f"{where}input_activations.", kind)
    return Scheme(
        method="compressed-tensors",
        layout=layout,
        kind=kind,
        group_size=group_size,
        block_rows=block[0] if strategy == "block" and block else None,
        symmetric=symmetric,
        is_sorted=order in ("group", "dynamic"),
        activations=activations,
        activation_group=activation_group,
        excluded=excluded,
    )


def _inputs(values: Any, where: str, kind: str) -> tuple[Literal["none", "int8", "fp8"], int | None]:
    """What a product rounds its tokens to, and the columns that share a scale."""
    if values is None:
        return "none", None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where[:-1]}={shown(values)}: expected an object")
    keys = ConfigKeys(values, where)
    if keys.take("dynamic") is not True:
        raise keys.error("dynamic", keys.take("dynamic"), "true: static scales of inputs are not supported")
    found = KINDS.get((keys.take("num_bits", 8), keys.take("type", "int")))
    if found != kind or kind == "int4":
        raise CheckpointError(
            f"{where}num_bits={shown(keys.take('num_bits', 8))} of type {shown(keys.take('type', 'int'))} is not "
            f"supported beside {kind} weights"
        )
    keys.only("symmetric", True)
    keys.only("actorder", False)
    group = None
    if keys.take("strategy") == "group":
        group = keys.size("group_size")
    else:
        keys.only("strategy", "token")
        keys.take("group_size")
    keys.only("block_structure")
    keys.refuse_rest(ARGS_NEUTRAL)
    return ("int8" if kind == "int8" else "fp8"), group


METHODS: dict[str, Callable[[ConfigKeys], Scheme]] = {
    "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8,
}  # fmt: skip


def _bits(keys: ConfigKeys, *allowed: int) -> int:
    allowed = allowed or (4, 8)
    bits = keys.size("bits")
    if bits not in allowed:
        raise CheckpointError(f"{WHERE}bits={bits} is not supported, only {' or '.join(map(str, allowed))}")
    return bits


def _group_size(keys: ConfigKeys) -> int | None:
    value = keys.take("group_size")
    return None if value == -1 else keys.size("group_size", 128)


def _block(keys: ConfigKeys, key: str) -> tuple[int, int] | None:
    value = keys.take(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise keys.error(key, value, "rows and columns of a block")
    return value[0], value[1]


def _names(keys: ConfigKeys, key: str) -> Callable[[str], bool]:
    """Whether a list of module names, ends or beginnings of them, or "re:" patterns has a module."""
    names = keys.take(key) or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise keys.error(key, names, "a list of modules")
    patterns = [_pattern(n[3:], key) for n in names if n.startswith("re:")]
    plain = [n for n in names if not n.startswith("re:")]

    def has(module: str) -> bool:
        return any(p.match(module) for p in patterns) or any(
            module == n or module.endswith(f".{n}") or module.startswith(f"{n}.") for n in plain
        )

    return has


def _pattern(text: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as e:
        raise CheckpointError(f"{WHERE}{key}: {shown(text, 120)} is no pattern: {e}") from None
