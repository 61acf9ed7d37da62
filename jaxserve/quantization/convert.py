"""From a plain checkpoint to a quantized one, in our own format or as other engines load it."""

import hashlib
import json
from pathlib import Path

from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.open import open_checkpoint
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.checkpoint.unfinished import Progress
from jaxserve.quantization.calibrated import CalibratedSource
from jaxserve.quantization.checkpoint import QuantizedCheckpoint, RoundedSource
from jaxserve.quantization.recipe import CALIBRATED, quantized_config

CALIBRATION_TEXT = Path(__file__).parent / "calibration.txt"  # in the public domain, as it says itself
SEQUENCE_LEN, MAX_SEQUENCES = 512, 64


def quantize(
    src: str | Path | Checkpoint,
    dst: str | Path,
    *,
    method: str,
    group_size: int | None = None,
    symmetric: bool = False,
    calibration: str | Path | None = None,
    dtype: str | None = None,
    quantization: str = "auto",
    format: str = "orbax",
    on_progress: Progress | None = None,
) -> Path:
    """Writes ``src`` quantized into the folder ``dst`` and returns ``dst``; as ``checkpoint.convert.convert``, which
    has the arguments and errors that are not told of here.

    Args:
        method, group_size, symmetric: see ``recipe.quantized_config``.
        calibration: a file of text in UTF-8 for gptq and awq, of which the first 32768 tokens are read; None is the
            small text that comes with the package.
        dtype: of what stays as it is.
        format: "safetensors" writes the layouts of AWQ (also for int4-rtn), GPTQ (also for int4-rtn without zero
            points) or compressed-tensors (int8, w8a8).

    Raises:
        CheckpointError: also what ``quantized_config`` says; a weight or an activation that is not finite; a
            calibration text that is empty, is not UTF-8, or that the method does not read.
    """
    if isinstance(src, (str, Path)):
        with open_checkpoint(src, quantization=quantization, on_progress=on_progress) as source:
            return quantize(
                source,
                dst,
                method=method,
                group_size=group_size,
                symmetric=symmetric,
                calibration=calibration,
                dtype=dtype,
                format=format,
                on_progress=on_progress,
            )
    if quantization != "auto":
        raise CheckpointError(f"quantization={quantization!r}: {src.path} is open already, as it was asked for then")
    config = quantized_config(src.config, method, group_size, symmetric=symmetric)
    recipe = str(config.quantization)
    if method in CALIBRATED:
        sequences = calibration_sequences(src, CALIBRATION_TEXT if calibration is None else Path(calibration))
        params = CalibratedSource(src.read, config, sequences)
        recipe += hashlib.sha256(json.dumps(sequences).encode()).hexdigest()
    elif calibration is not None:
        raise CheckpointError(f"calibration={str(calibration)!r}: quantize={method!r} reads no text")
    else:
        params = RoundedSource(src.read, config)
    quantized = QuantizedCheckpoint(src, config, params, recipe)
    return convert(quantized, dst, dtype=dtype, format=format, on_progress=on_progress)


def calibration_sequences(source: Checkpoint, path: Path) -> list[list[int]]:
    """The text of ``path`` as sequences of tokens, of ``SEQUENCE_LEN`` but the last. CheckpointError names ``path``."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise CheckpointError(f"{source.path} has no tokenizer, which calibration needs")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise CheckpointError(f"calibration: {path}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise CheckpointError(f"calibration: {path} is not UTF-8: {e.reason} at byte {e.start}") from None
    length = min(SEQUENCE_LEN, source.config.max_position_embeddings)
    ids = tokenizer.encode(text)[: length * MAX_SEQUENCES]
    if len(ids) < 2:
        raise CheckpointError(f"calibration: {path} has {len(ids)} tokens, at least 2 are needed")
    return [ids[i : i + length] for i in range(0, len(ids), length)]
