"""LoRA adapters as the `peft` library saves them: a folder with adapter_config.json and adapter_model.safetensors.

Tensors are named after the modules of the base model's Hugging Face architecture, so the family's own table
(``hf.families``) says where they go: ``B`` of a module has the rows of its weight, ``A`` its columns.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.families import FAMILIES, HFFamily
from jaxserve.checkpoint.hf.files import map_file
from jaxserve.checkpoint.hf.layout import AXES, Piece, Source, groups_of, pieces
from jaxserve.checkpoint.hf.safetensors_header import FLOATS, read_header, view_tensor
from jaxserve.checkpoint.json_file import read_json, shown
from jaxserve.config import ModelConfig
from jaxserve.model.lora import Adapter, Factors, factor_shapes

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<which>[AB])\.weight")

CHECKED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others change the base model's weights, too (pissa, olora, corda, loftq, lora_ga).
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}  # keys -> the values that we serve; an absent one is the first
KNOWN = frozenset((
    *CHECKED, "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    # What the tensors say themselves: which modules of which layers there are.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # Of the training, or of how peft would run it.
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout",
    "peft_version", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "megatron_config", "runtime_config", "qalora_group_size",
))  # fmt: skip
# Every other key must be null, false or empty: modules_to_save, use_dora, lora_bias, trainable_token_indices, ...


def read_adapter(path: str | Path, config: ModelConfig, max_rank: int) -> Adapter:
    """The adapter in the folder ``path`` for the model of ``config``.

    Raises:
        CheckpointError: one line naming the folder and the key or tensor at fault, with both numbers.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder with {CONFIG} and {TENSORS}")
    try:
        return _Reader(path, config, max_rank).read()
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


class _Module(NamedTuple):
    """One module's pair of tensors."""

    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]
    scale: float


class _Reader:
    def __init__(self, path: Path, config: ModelConfig, max_rank: int):
        self._config, self._max_rank = config, max_rank
        self._family = _family(config)
        self._values = read_json(path / CONFIG)
        self._check_config()
        if not (path / TENSORS).exists() and (path / "adapter_model.bin").exists():
            raise CheckpointError(f"adapter_model.bin is a pickle, which can run code: save it as {TENSORS}")
        data = map_file(path / TENSORS)
        self._infos = read_header(memoryview(data))  # type: ignore[arg-type]
        self._data = data

    def read(self) -> Adapter:
        places = self._places()
        modules = self._modules(set(places.values()))
        self._check_all_there(places, modules)
        rank = max(module.a.shape[0] for module in modules.values())
        layers: list[Mapping[str, Factors]] = []
        for i in range(self._config.num_layers):
            layer: dict[str, Factors] = {}
            for parameter, (a_shape, b_shape) in factor_shapes(self._config, i, rank).items():
                found = [(p, modules[m]) for m, p in self._pieces(parameter, i, b_shape) if m in modules]
                if found:
                    layer[parameter] = _factors(parameter, a_shape, b_shape, found)
            layers.append(layer)
        return Adapter(rank, tuple(layers))

    def _check_config(self) -> None:
        values = self._values
        for key, allowed in CHECKED.items():
            value = values.get(key, allowed[0])
            if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
                raise CheckpointError(f"{CONFIG}: {key}={shown(value)} cannot be served, only {shown(list(allowed))}")
        for key, value in values.items():
            if key not in KNOWN and value not in (None, False, [], {}):
                raise CheckpointError(f"{CONFIG}: {key}={shown(value)} cannot be served")
        for key in ("r", "lora_alpha"):
            self._number(key, values.get(key))
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = values.get(key) or {}
            if not isinstance(pattern, dict):
                raise CheckpointError(f"{CONFIG}: {key}={shown(pattern)} is not an object")
            for name, value in pattern.items():
                self._number(f"{key}[{shown(name)}]", value)
        layers = values.get("layers_to_transform")
        listed = [layers] if isinstance(layers, int) else layers
        if listed is not None and not (isinstance(listed, list) and all(type(i) is int for i in listed)):
            raise CheckpointError(f"{CONFIG}: layers_to_transform={shown(layers)} is not a list of layers")
        if not isinstance(values.get("use_rslora", False), bool):
            raise CheckpointError(f"{CONFIG}: use_rslora={shown(values['use_rslora'])} is not true or false")

    def _number(self, key: str, value: Any) -> None:
        """Raises unless it is a rank or an alpha."""
        wants_integer = key.startswith("r")
        kinds = (int,) if wants_integer else (int, float)
        if type(value) not in kinds or not 0 < value < 1e9:
            raise CheckpointError(
                f"{CONFIG}: {key}={shown(value)} is not a positive {'integer' if wants_integer else 'number'}"
            )

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        """The value of the first entry of ``key`` that names ``module``, or the end of its name, as peft matches."""
        for pattern, value in (self._values.get(key) or {}).items():
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    return value
            except re.error as error:
                raise CheckpointError(f"{CONFIG}: {key}: {shown(pattern)} is no regular expression: {error}") from None
        return default

    def _pieces(self, parameter: str, layer: int, b_shape: tuple[int, ...]) -> Iterator[tuple[str, Piece]]:
        """(module, where its B lies in the parameter's) of each."""
        into = AXES[parameter][0].split()[-1]  # letter of the input's axis
        recipe = self._family.tensors[parameter][0]
        rows = tuple(_rows_first(source, into) for source in recipe)
        for piece in pieces(parameter, {parameter: b_shape}, rows, self._family.prefixes[0], layer):
            yield piece.tensor.removesuffix(".weight"), piece

    def _places(self) -> dict[tuple[int, str], str]:
        """(layer, parameter and its part) -> module, for every module that may have an adapter."""
        return {
            (i, f"{parameter} {piece.box}"): module
            for i in range(self._config.num_layers)
            for parameter, (_, b_shape) in factor_shapes(self._config, i, 1).items()
            for module, piece in self._pieces(parameter, i, b_shape)
        }

    def _modules(self, known: set[str]) -> dict[str, _Module]:
        """The adapter's modules by the base model's name for them, their shapes' ranks checked."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, info in self._infos.items():
            match = TENSOR.fullmatch(name)
            if match is None:
                raise CheckpointError(f"tensor {shown(name, 120)} is not the A or B of a matrix' adapter")
            module = next((m for m in self._names(match["module"]) if m in known), None)
            if module is None:
                what = "experts cannot have adapters" if ".experts" in name else f"only {', '.join(_last(known))} can"
                raise CheckpointError(f"tensor {shown(name, 120)}: this module cannot have an adapter: {what}")
            if info.dtype not in FLOATS:
                raise CheckpointError(f"tensor {name!r} of type {info.dtype} cannot be read, only {FLOATS}")
            tensor = view_tensor(self._data, info).astype(np.float32)
            if tensor.ndim != 2:
                raise CheckpointError(f"tensor {name!r} has shape {tensor.shape}, expected two axes")
            found.setdefault(module, {})[match["which"]] = tensor
        if not found:
            raise CheckpointError(f"{TENSORS} has no tensors")
        return {module: self._module(module, pair) for module, pair in found.items()}

    def _names(self, module: str) -> Iterator[str]:
        """A module's name under the first of the family's prefixes."""
        for prefix in self._family.prefixes:
            if module.startswith(prefix):
                yield self._family.prefixes[0] + module.removeprefix(prefix)

    def _module(self, module: str, pair: dict[str, np.ndarray]) -> _Module:
        for which in "AB":
            if which not in pair:
                raise CheckpointError(f"tensor '{module}.lora_{which}.weight' is missing")
        rank = self._pattern("rank_pattern", module, self._values["r"])
        if rank > self._max_rank:
            raise CheckpointError(f"{CONFIG}: r={rank} of {module} is more than max_lora_rank={self._max_rank}")
        for which, got in (("A", pair["A"].shape[0]), ("B", pair["B"].shape[1])):
            if got != rank:
                raise CheckpointError(
                    f"tensor '{module}.lora_{which}.weight' of shape {pair[which].shape} has rank {got}, "
                    f"{CONFIG} says {rank}"
                )
        alpha = self._pattern("alpha_pattern", module, self._values["lora_alpha"])
        return _Module(pair["A"], pair["B"], alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank))

    def _check_all_there(self, places: Mapping[tuple[int, str], str], modules: Mapping[str, _Module]) -> None:
        """Raises where a module that the config names is in no tensor, and nothing says why."""
        targets, layers = self._values.get("target_modules"), self._values.get("layers_to_transform")
        if not isinstance(targets, list) or self._values.get("exclude_modules"):
            return
        only = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        for (layer, _), module in places.items():
            is_target = any(module == t or module.endswith(f".{t}") for t in targets)
            if is_target and module not in modules and (only is None or layer in only):
                raise CheckpointError(f"tensor '{module}.lora_A.weight' is missing: target_modules names its module")


def _factors(
    parameter: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...], found: list[tuple[Piece, _Module]]
) -> Factors:
    """A and B of one parameter from its modules', with shapes as of ``factor_shapes``."""
    a, b = np.zeros(a_shape, np.float32), np.zeros(b_shape, np.float32)
    for piece, module in found:
        name = piece.tensor.removesuffix(".weight")
        rank, rows = module.a.shape[0], piece.shape[0]
        for which, got, want in (("A", module.a.shape, (rank, a_shape[-1])), ("B", module.b.shape, (rows, rank))):
            if got != want:
                raise CheckpointError(f"tensor '{name}.lora_{which}.weight' has shape {got}, expected {want}")
        padded = np.zeros((rows, b_shape[-1]), np.float32)
        padded[:, :rank] = module.b * module.scale
        b[piece.box] = piece.view(padded)
        a[_a_pieces(parameter, piece, b_shape), :rank] = module.a
    return a, b


def _a_pieces(parameter: str, piece: Piece, b_shape: tuple[int, ...]) -> slice:
    """Which of the parameter's As (``model.lora.PIECES``) a module's A is."""
    if parameter == "gate_up":
        return piece.box[0]
    if parameter == "qkv":  # heads of a group: the queries, the key, the value
        before_key, heads = b_shape[1] - 2, piece.box[1]
        return slice(max(heads.start - before_key + 1, 0), max(heads.stop - before_key, 0) + 1)
    return slice(0, 1)


def _rows_first(source: Source, into: str) -> Source:
    """``source`` of a matrix as that of its B: the input's axis last, also where the matrix is kept transposed."""
    groups = [group for group in groups_of(source.layout) if group != [into]]
    layout = " ".join(f"({' '.join(group)})" for group in groups)
    return dataclasses.replace(source, layout=f"{layout} {into}")


def _family(config: ModelConfig) -> HFFamily:
    for family in FAMILIES.values():
        if family.model_type == config.family:
            return family
    raise CheckpointError(f"the names of a {config.family!r} model's modules are not known")


def _last(modules: set[str]) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in modules})
