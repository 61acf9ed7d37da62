"""From a name or a path to what an engine is built of: config, parameters, tokenizer, and what the model recommends."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxserve.config import ModelConfig
from jaxserve.execution.dummy import DummyWeights
from jaxserve.model.params import ParamSource
from jaxserve.text.tokenizer import Tokenizer

READ_WHOLE = 1 << 20  # bytes of a file in a digest: of a larger one the header, which has the tensors

LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True)
class Model:
    """What was found under a name.

    Attributes:
        params: to read from while the model is open.
        sampling_defaults: fields of ``SamplingParams``.
    """

    name: str
    config: ModelConfig
    params: ParamSource | DummyWeights
    tokenizer: Tokenizer | None = None
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def opened_model(
    name_or_path: str | Path,
    *,
    load_format: LoadFormat = "auto",
    skip_tokenizer_init: bool = False,
    generation_config: Literal["auto", "none"] = "auto",
    quantization: str = "auto",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Model]:
    """The model of that name. Its files are open inside the block.

    Args:
        name_or_path: see ``jaxserve.checkpoint.open_checkpoint``.
        load_format: "dummy" makes random weights on the device instead of loading any, and no tokenizer:
            ``name_or_path`` is then a ``config.json``, its folder, or a name of ``checkpoint.shapes.SHAPES``.
        skip_tokenizer_init: no tokenizer: prompts are token ids, and completions have no text.
        generation_config: "auto" takes the sampling that the checkpoint recommends (generation_config.json), "none"
            does not.
        quantization: "auto" serves matrices of few bits as they are (those of GGUF files dequantized), "none"
            dequantizes all, a method's name keeps them: see ``open_checkpoint``.
        on_progress: called with (stage, done, total) while something is downloaded.

    Raises:
        CheckpointError: nothing is found under that name, or the file cannot be used; names the tensor or offset.
        ValueError: an option has none of its values, or does not go with "dummy".
    """
    from jaxserve.checkpoint.open import open_checkpoint
    from jaxserve.checkpoint.shapes import read_shape

    if load_format not in ("auto", "dummy"):
        raise ValueError(f"load_format={load_format!r} is not one of auto, dummy")
    if generation_config not in ("auto", "none"):
        raise ValueError(f"generation_config={generation_config!r} is not one of auto, none")
    if load_format == "dummy":
        if quantization != "auto":
            raise ValueError(f"quantization={quantization!r}: with load_format='dummy' the config.json says it")
        yield Model(Path(name_or_path).stem, read_shape(name_or_path), DummyWeights())
        return
    with open_checkpoint(name_or_path, quantization=quantization, on_progress=on_progress) as checkpoint:
        yield Model(
            checkpoint.model_name or str(name_or_path),
            checkpoint.config,
            checkpoint,
            None if skip_tokenizer_init else checkpoint.tokenizer(),
            checkpoint.sampling_defaults if generation_config == "auto" else {},
        )


def model_digest(name_or_path: str | Path, *, on_progress: Callable[[str, int, int], None] | None = None) -> str:
    """Tells two models apart without reading their weights: of the names and sizes of the files, and of the contents
    of those that are small enough to be read.

    Raises:
        CheckpointError: nothing is found under that name.
    """
    from jaxserve.checkpoint.resolve import resolve_model

    path = resolve_model(name_or_path, on_progress=on_progress)
    names = [path.name]
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for name in names:
        if name.startswith("."):  # notes of whoever downloaded it
            continue
        file = path if path.is_file() else path / name
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(READ_WHOLE))
    return digest.hexdigest()[:16]
