"""From a model's name and the engine options to an engine that is ready, with its start-up shown."""

from typing import TYPE_CHECKING

from jaxserve.cli.options import EngineOptions
from jaxserve.cli.terminal import ProgressDisplay

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine


def open_engine(model: str, options: EngineOptions) -> "Engine":
    """The engine of a command, in whichever thread it is to live.

    Raises:
        ValueError: an option or the checkpoint is wrong (``CheckpointError``).
    """
    keywords = options.keywords()
    with ProgressDisplay() as progress:
        progress("import jax", 0, None)
        import jax

        from jaxserve.engine.engine import Engine

        progress("import jax", 1, 1)  # its bar is full
        if options.platform is not None:
            jax.config.update("jax_platforms", options.platform)
        return Engine.from_pretrained(model, on_progress=progress, **keywords)
