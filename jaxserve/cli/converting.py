"""The ``convert`` command."""

from pathlib import Path
from typing import Annotated

import typer

from jaxserve.cli.options import Model
from jaxserve.cli.terminal import ProgressDisplay, note


def convert(
    src: Model,
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. (default: as stored; quantized is float32)")
    ] = None,
    quantization: Annotated[
        str, typer.Option(help="auto: as stored, GGUF dequantized; none: dequantized; gguf, gptq, awq, ...: as stored.")
    ] = "auto",
    format: Annotated[
        str, typer.Option(help="orbax, our own; or safetensors, for what came from a Hugging Face folder.")
    ] = "orbax",
) -> None:
    """Write a checkpoint in our own format, or back to safetensors. Run it again to continue after an interruption."""
    from jaxserve.checkpoint.convert import convert as convert_checkpoint

    interrupted_at: tuple[int, int] | None = None
    with ProgressDisplay() as progress:

        def on_progress(stage: str, done: int, total: int) -> None:
            nonlocal interrupted_at
            if stage == "convert":
                interrupted_at = (done, total)
            progress(stage, done, total)

        try:
            convert_checkpoint(src, dst, dtype=dtype, quantization=quantization, format=format, on_progress=on_progress)
        except KeyboardInterrupt:
            progress.__exit__(None, None, None)
            if interrupted_at is not None:
                done, total = interrupted_at
                note(f"interrupted: {dst} has {done} of {total} tensors; the same command continues")
            raise
    note(f"{dst} is complete")
