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
    quantize: Annotated[
        str | None, typer.Option(help="Quantize the layers' matrices: int8, w8a8, int4-rtn, gptq or awq. (default: no)")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Input columns that share an int4's scale. (default: 128, 64 or 32, what divides all)"),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="An int4 of int4-rtn or gptq without zero points: GPTQ's first format.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="A file of text for gptq and awq. (default: a small one of our own)")
    ] = None,
) -> None:
    """Write a checkpoint in our own format, quantized if asked, or back to safetensors. Run it again to continue after
    an interruption."""
    if quantize is None and group_size is not None:
        raise ValueError(f"group_size={group_size} is of --quantize, which is not given")
    if quantize is None and symmetric:
        raise ValueError("symmetric is of --quantize, which is not given")
    if quantize is None and calibration is not None:
        raise ValueError(f"calibration={str(calibration)!r} is of --quantize, which is not given")
    from jaxserve.checkpoint.convert import convert as convert_checkpoint

    interrupted_at: tuple[int, int] | None = None
    with ProgressDisplay() as progress:

        def on_progress(stage: str, done: int, total: int) -> None:
            nonlocal interrupted_at
            if stage == "convert":
                interrupted_at = (done, total)
            progress(stage, done, total)

        try:
            if quantize is None:
                convert_checkpoint(
                    src, dst, dtype=dtype, quantization=quantization, format=format, on_progress=on_progress
                )
            else:
                from jaxserve.quantization.convert import quantize as quantize_checkpoint

                quantize_checkpoint(
                    src,
                    dst,
                    method=quantize,
                    group_size=group_size,
                    symmetric=symmetric,
                    calibration=calibration,
                    dtype=dtype,
                    quantization=quantization,
                    format=format,
                    on_progress=on_progress,
                )
        except KeyboardInterrupt:
            progress.__exit__(None, None, None)
            if interrupted_at is not None:
                done, total = interrupted_at
                note(f"interrupted: {dst} has {done} of {total} tensors; the same command continues")
            raise
    note(f"{dst} is complete")
