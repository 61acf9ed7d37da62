"""Adapters that operators load and unload while serving, whichever way they ask."""

from pathlib import Path

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.errors import RequestError
from jaxserve.request import LoadedAdapter
from jaxserve.server.options import ServerOptions


class NotAllowedError(RequestError):
    """A path that this server does not read from."""


def check_path(field: str, path: Path, folders: tuple[Path, ...], what: str) -> None:
    """Raises NotAllowedError unless ``path``, links followed, is one of ``folders`` or in one."""
    if not any(path.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise NotAllowedError(field, f"{str(path)!r:.300} is in none of the folders that this server takes {what} from")


async def load_lora(engine: AsyncEngine, options: ServerOptions, name: str, path: str) -> LoadedAdapter:
    """``AsyncEngine.load_lora`` of a path on the allow-list, under a name that is none of the base model's.

    Raises RequestError for whatever is wrong, with the field, besides what ``AsyncEngine.load_lora`` raises.
    """
    try:
        check_path("lora_path", Path(path), options.lora_folders, "adapters")
        if name in options.served_model_names:
            raise RequestError("lora_name", f"{name!r} is a name of the base model")
        return await engine.load_lora(name, path)
    except RequestError:
        raise
    except (ValueError, OSError) as error:  # a file that cannot be used
        raise RequestError("lora_path", str(error)) from error
