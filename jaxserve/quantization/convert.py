"""From a plain checkpoint to a quantized one in our own format."""

from pathlib import Path

from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.open import open_checkpoint
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.checkpoint.unfinished import Progress
from jaxserve.quantization.checkpoint import QuantizedCheckpoint, RoundedSource
from jaxserve.quantization.recipe import quantized_config


def quantize(
    src: str | Path | Checkpoint,
    dst: str | Path,
    *,
    method: str,
    group_size: int | None = None,
    dtype: str | None = None,
    quantization: str = "auto",
    on_progress: Progress | None = None,
) -> Path:
    """Writes ``src`` quantized into the folder ``dst`` and returns ``dst``; as ``checkpoint.convert.convert``, which
    has the arguments and errors that are not told of here.

    Args:
        method, group_size: see ``recipe.quantized_config``.
        dtype: of what stays as it is.

    Raises:
        CheckpointError: also what ``quantized_config`` says; a weight that is not finite.
    """
    if isinstance(src, (str, Path)):
        with open_checkpoint(src, quantization=quantization, on_progress=on_progress) as source:
            return quantize(source, dst, method=method, group_size=group_size, dtype=dtype, on_progress=on_progress)
    config = quantized_config(src.config, method, group_size)
    read = RoundedSource(src.read, config).read
    checkpoint = QuantizedCheckpoint(src, config, read, str(config.quantization))
    return convert(checkpoint, dst, dtype=dtype, on_progress=on_progress)
