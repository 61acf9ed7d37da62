"""Hugging Face model folders: config.json, safetensors and what lies beside them.

``hf.families`` has what differs between architectures, ``hf.layout`` how their tensors lie in our parameters. Tensor
data stays memory-mapped; only what ``read`` is asked for is copied.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.config import eos_ids, family_of, read_hf_config
from jaxserve.checkpoint.hf.families import HFFamily
from jaxserve.checkpoint.hf.files import TensorFiles, has_tensors
from jaxserve.checkpoint.hf.layout import Piece, Recipe, pieces, read_box
from jaxserve.checkpoint.hf.quantized_layout import quantized_parameters, read_leaf
from jaxserve.checkpoint.hf.quantized_module import LogicalTensors, QuantizedModule, find_modules
from jaxserve.checkpoint.hf.safetensors_header import FLOATS
from jaxserve.checkpoint.hf.scheme import Scheme, read_scheme
from jaxserve.checkpoint.json_file import read_json, shown
from jaxserve.config import MatrixFormat
from jaxserve.text.tokenizer import Tokenizer, TokenizerError

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class HFCheckpoint:
    """An open Hugging Face folder (a ``protocol.Checkpoint``) whose config and tensors have been checked.

    Every tensor of the files is a part of a parameter, or one of the family's that say nothing new, or refused. With
    ``allow_bare`` a folder without tensors can be opened for what its config says.

    A quantized folder's matrices stay as they are where ``quantization`` is "auto" (``config.quantization`` has their
    formats), and are dequantized when they are read where it is "none"; so are always those that are no parameter of
    their own kind in our tree (MLA's up projections), or that are fused with others of another format.

    Attributes:
        path, config, architecture, model_name, license, num_bytes, num_params, sampling_defaults: see ``Checkpoint``.
            ``sampling_defaults`` are taken from generation_config.json whether it says do_sample or not, as vLLM does.

    Raises:
        CheckpointError: one line naming the folder or file and the key or tensor at fault.
    """

    def __init__(self, path: str | Path, *, allow_bare: bool = False, quantization: Literal["auto", "none"] = "auto"):
        from jaxserve.model.params import named_leaves, param_specs  # imports jax

        self.path = Path(path)
        self.model_name = _model_name(self.path)
        self.license = _license(self.path / "README.md")
        self._tensors: TensorFiles | None = None
        self._modules: dict[str, QuantizedModule] = {}
        try:
            values = read_json(self.path / "config.json")
            config = read_hf_config(values)
            self._family = family_of(values)
            scheme = read_scheme(values)
            generation = self.path / "generation_config.json"
            generated = read_json(generation) if generation.exists() else {}
            eos = eos_ids(generated.get("eos_token_id"), config.vocab_size)
            self.sampling_defaults: dict[str, Any] = _sampling_defaults(generated)
        except CheckpointError as e:
            raise CheckpointError(f"{self.path}: {e}") from None
        self.config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *eos))))
        self.architecture = self._family.architecture
        self._formats: dict[str, MatrixFormat] = {}
        self._shapes = {name: spec.shape for name, spec in named_leaves(param_specs(self.config))}
        self.num_params = sum(map(math.prod, self._shapes.values()))
        self.num_bytes = 0
        if has_tensors(self.path) or not allow_bare:
            self._tensors = TensorFiles(self.path)
            self._logical: TensorFiles | LogicalTensors = self._tensors
            self.num_bytes = self._tensors.num_bytes
            self._prefix = self._find_prefix()
            try:
                if scheme is not None:
                    self._find_modules(scheme, keep=quantization == "auto")
                self._check_tensors(_draft_layers(self._family, values, self.config.num_layers))
            except CheckpointError as e:
                raise CheckpointError(f"{self.path}: {e}") from None

    def __enter__(self) -> "HFCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files; config and the other attributes stay readable."""
        if self._tensors is not None:
            self._tensors.close()

    @property
    def tensor_files(self) -> TensorFiles | None:
        """The folder's tensors as they are; None where it has none."""
        return self._tensors

    def drop_pages(self) -> None:
        """See ``mapped.drop_pages``."""
        if self._tensors is not None:
            self._tensors.drop_pages()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer and chat template of the folder; None where it has none."""
        from jaxserve.text.hf_tokenizer import tokenizer_from_folder

        try:
            tokenizer = tokenizer_from_folder(self.path, self.config.eos_token_ids)
        except TokenizerError as e:  # some name the file, some only what is wrong with it
            raise CheckpointError(str(e) if str(self.path) in str(e) else f"{self.path}: {e}") from None
        return tokenizer

    def tensor_types(self) -> dict[str, int]:
        """Bytes of tensor data by safetensors dtype, most first."""
        num_bytes: Counter[str] = Counter()
        for tensor in self._tensors.infos.values() if self._tensors is not None else ():
            num_bytes[tensor.dtype] += tensor.num_bytes
        return dict(num_bytes.most_common())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part ``index`` of parameter ``name``, a copy: in the file's own float type where its tensors agree and it
        has at most 32 bits, else in float32; of a quantized one in the leaf's own type."""
        if self._tensors is None:
            raise CheckpointError(f"{self.path} has no tensors, only a config.json")
        matrix, _, leaf = name.rpartition(".")
        if matrix in self._formats:
            return read_leaf(matrix, leaf, index, self._pieces, self._modules, self._formats[matrix])
        experts = index[0] if ".experts_" in name else None
        found = read_box(self._pieces(name, experts), self._logical, index)
        dtypes = {part.dtype for _, part in found}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        out = np.empty([i.stop - i.start for i in index], np.float32 if dtype.itemsize > 4 else dtype)
        for where, part in found:
            out[where] = part
        return out

    def _find_modules(self, scheme: Scheme, *, keep: bool) -> None:
        """Sets the modules and, where they are to be kept, ``config.quantization``."""
        assert self._tensors is not None
        self._modules = find_modules(self._tensors, scheme)
        if not self._modules:
            raise CheckpointError(f"quantization_config says {scheme.method}, but no tensor is quantized")
        self._logical = LogicalTensors(self._tensors, self._modules)
        found = quantized_parameters(scheme.method, self._shapes, self._pieces, self._modules)
        if keep and found.matrices:
            self.config = dataclasses.replace(self.config, quantization=found)
            self._formats = found.formats()

    def _pieces(self, name: str, experts: slice | None = None, columns: int | None = None) -> Iterator[Piece]:
        """The pieces of a parameter; as if its last axis had so many ``columns``."""
        *parents, parameter = name.split(".")
        layer = int(parents[1]) if parents else None
        shapes = {p: self._shapes[n] for p in _together(parameter) if (n := ".".join([*parents, p])) in self._shapes}
        if columns is not None:
            shapes[parameter] = (*shapes[parameter][:-1], columns)
        recipe = self._recipe(parameter, layer)
        selected = None if experts is None else range(experts.start, experts.stop)
        return pieces(parameter, shapes, recipe, self._prefix, layer, selected)

    def _recipe(self, parameter: str, layer: int | None) -> Recipe:
        """Of those for the parameter the first whose first tensor exists, else the first."""
        recipes = self._family.tensors[parameter]
        assert self._tensors is not None
        for recipe in recipes:
            if recipe[0].tensor.format(p=self._prefix, i=layer, e=0) in self._logical.infos:
                return recipe
        return recipes[0]

    def _find_prefix(self) -> str:
        assert self._tensors is not None
        embedding = self._family.tensors["embed"][0][0].tensor
        prefixes = self._family.prefixes
        return next((p for p in prefixes if embedding.format(p=p) in self._tensors.infos), prefixes[0])

    def _check_tensors(self, draft_layers: range) -> None:
        """Raises CheckpointError naming the first tensor that is missing, misshapen (with both shapes), not of floats
        or unknown."""
        assert self._tensors is not None
        infos, used = self._logical.infos, set[str]()
        for name in self._shapes:
            for piece in self._pieces(name):
                info = infos.get(piece.tensor)
                if info is None:
                    raise CheckpointError(f"tensor {piece.tensor!r} is missing, expected shape {piece.shape}")
                if info.shape != piece.shape:
                    raise CheckpointError(f"tensor {piece.tensor!r} has shape {info.shape}, expected {piece.shape}")
                if info.dtype not in FLOATS:
                    raise CheckpointError(f"tensor {piece.tensor!r} of type {info.dtype} cannot be read, only {FLOATS}")
                used.add(piece.tensor)
        ignored = re.compile("|".join(self._family.ignored))
        head = self._family.tensors["head"][0][0].tensor
        for name, info in infos.items():
            if name in used or ignored.fullmatch(name) or 0 in info.shape:  # a shared expert that is none
                continue
            layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
            if layer and int(layer[1]) in draft_layers:
                continue
            embedding = self._shapes["embed"]
            if name == head and self.config.tie_word_embeddings:  # a copy of the embedding that it is tied to
                if info.shape == embedding:
                    continue
                raise CheckpointError(f"tensor {name!r} has shape {info.shape}, the tied embedding {embedding}")
            raise CheckpointError(
                f"tensor {shown(name, 120)} of shape {info.shape} is not one of a {self._family.model_type} model"
            )


def _together(parameter: str) -> tuple[str, ...]:
    """Parameters whose shapes it takes to read one: those that share a tensor with it."""
    return ("k_up", "v_up") if parameter in ("k_up", "v_up") else (parameter,)


def _draft_layers(family: HFFamily, values: dict[str, Any], num_layers: int) -> range:
    """Layers past the model's own that predict several tokens at once (DeepSeek-V3, GLM-4.5): they only draft."""
    count = values.get("num_nextn_predict_layers", values.get("num_mtp_layers"))
    default = family.defaults.get("num_nextn_predict_layers", 0)
    return range(num_layers, num_layers + (default if count is None else count))


def _sampling_defaults(values: dict[str, Any]) -> dict[str, Any]:
    given = {key: values[key] for key in SAMPLING_KEYS if values.get(key) is not None}
    for key, value in given.items():
        kinds = (int,) if key == "top_k" else (int, float)
        if type(value) not in kinds or abs(value) > 1e9:
            kind = "an integer" if key == "top_k" else "a number"
            raise CheckpointError(f"generation_config.json: {key}={shown(value)} is not {kind}")
    return given


def _model_name(path: Path) -> str:
    """The folder's name; of a folder in the hub's cache (``models--org--name/snapshots/...``) the model's."""
    path = path.absolute()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name


def _license(readme: Path) -> str | None:
    """What the front matter of a model card says."""
    try:
        with readme.open("rb") as file:
            text = file.read(16_384).decode("utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*([^\r\n]{1,80})$", front[1], re.MULTILINE) if front else None
    return found[1].strip(" \"'") if found else None
