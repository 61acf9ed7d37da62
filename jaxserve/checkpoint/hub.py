"""Models of the Hugging Face hub by name: ``org/name``, ``org/name@revision``, ``org/name:file.gguf``.

`huggingface_hub` does the transfer and keeps its cache: files that are whole stay, a connection that drops is resumed
where it stopped, and with HF_HUB_OFFLINE nothing but the cache is asked. HF_TOKEN, HF_ENDPOINT and HF_HOME are its own.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.unfinished import Progress

STAGE = "download MiB"
NEEDED_FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "README.md",  # its front matter has the licence
)
NOT_NEEDED = ("*/*", "consolidated*.safetensors")  # other formats' folders, and a second copy of the weights (Mistral)

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]{{1,200}}))?(?::([^:@\0]{{1,200}}\.gguf))?", re.ASCII)


class HubName(NamedTuple):
    repo_id: str
    revision: str | None  # branch, tag or commit; None: main
    file: str | None  # a .gguf of the repository; None: its safetensors

    def __str__(self) -> str:
        return self.repo_id + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def parse_hub_name(text: str) -> HubName | None:
    """The name that ``text`` is, None where it is none."""
    match = _NAME.fullmatch(text)
    return HubName(*match.groups()) if match else None


def download_model(
    name: HubName,
    *,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """The folder (or ``.gguf`` file) of a model in the hub's cache, downloaded as far as it is not there.

    Args:
        endpoint, cache_dir: for `huggingface_hub`; None is its own setting.
        on_progress: called with (STAGE, MiB there, MiB in all), from any thread.

    Raises:
        CheckpointError: one line: not found, gated (with what to do), no network, not in the cache.
    """
    import huggingface_hub

    where: dict[str, Any] = {"endpoint": endpoint, "cache_dir": cache_dir, "revision": name.revision}
    with _hub_errors(name, endpoint):
        bar = _bar_class(on_progress)
        if name.file is not None:
            return Path(huggingface_hub.hf_hub_download(name.repo_id, name.file, tqdm_class=bar, **where))
        folder = Path(
            huggingface_hub.snapshot_download(
                name.repo_id,
                allow_patterns=list(NEEDED_FILES),
                ignore_patterns=list(NOT_NEEDED),
                tqdm_class=bar,
                **where,
            )
        )
        if any(folder.glob("*.safetensors")):
            return folder
        tree = huggingface_hub.get_cached_repo_tree(name.repo_id, revision=name.revision, cache_dir=cache_dir)
        files = [f.path for f in tree if f.path.endswith(".gguf")]
    held = f"no safetensors, only {len(files)} .gguf files: give one, as {name.repo_id}:{files[0]}" if files else ""
    raise CheckpointError(f"model {name}: the repository has {held or 'neither safetensors nor .gguf files'}")


@contextmanager
def _hub_errors(name: HubName, endpoint: str | None) -> Iterator[None]:
    """What the hub's library says, as one line that says what to do."""
    from huggingface_hub import constants, errors

    hub = endpoint or constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"model {name} is gated: accept its licence at {hub}/{name.repo_id}, then set HF_TOKEN to a token of that "
            "account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"no model {name}: neither a file nor a folder here, nor known to {hub} (a private one needs HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"model {name}: {hub}/{name.repo_id} has no revision {name.revision!r}") from None
    except errors.RemoteEntryNotFoundError:
        raise CheckpointError(f"model {name}: {hub}/{name.repo_id} has no file {name.file!r}") from None
    except errors.LocalEntryNotFoundError as e:
        what = "is incomplete" if isinstance(e, errors.IncompleteSnapshotError) else "is not there"
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(f"model {name}: in the cache it {what}, and HF_HUB_OFFLINE is set") from None
        cause = f": {_line(e.__cause__)}" if e.__cause__ is not None else ""
        raise CheckpointError(f"model {name}: {hub} cannot be reached{cause}; in the cache it {what}") from None
    except CheckpointError:
        raise
    except Exception as e:  # of its HTTP library, of a server that answers nonsense, of the disk
        raise CheckpointError(f"model {name}: {hub}: {_line(e)}") from None


def _line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def _bar_class(on_progress: Progress | None) -> Any:
    """A class with as much of tqdm's interface as the hub's library uses; its bars of bytes call ``on_progress``."""

    class Bar:
        def __init__(self, *args: Any, total: float | None = None, initial: float = 0, desc: str = "", **others: Any):
            self.total, self.n, self.desc = total, initial, desc
            # Of several bars over the same bytes one is of those on the disk; one is of files.
            self._is_shown = others.get("unit") == "B" and not desc.startswith("Downloading bytes")

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            self.refresh()

        def refresh(self, *args: Any, **others: Any) -> None:
            if on_progress is not None and self._is_shown and self.total:
                on_progress(STAGE, int(self.n) >> 20, -(-int(self.total) >> 20))

        def close(self) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            if name.startswith("set_"):  # descriptions and postfixes
                return lambda *args, **others: None
            raise AttributeError(name)

    return Bar
