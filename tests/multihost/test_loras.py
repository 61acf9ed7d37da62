"""Adapters of an engine over two processes, each of which reads its own files."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from jaxserve.checkpoint.hf.adapter import CONFIG
from tests.lora import golden
from tests.multihost.conftest import free_port, processes
from tests.multihost.lora_worker import EVERYWHERE, SOME, build, work

START_S = 280.0  # a busy machine compiles slowly
MESHES = "tensor=4;stage=2,tensor=2"  # halves of every layer to each process, then half of the layers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of both processes; what process 1 does not have, and what it has with another scale."""
    for index in ("0", "1"):
        for name, adapter in (("all", "llama_all"), ("some", "llama_some"), ("other", "llama_some")):
            shutil.copytree(golden.FOLDER / adapter, tmp_path / index / name)
    (tmp_path / "1" / "other" / CONFIG).write_text(
        json.dumps(json.loads((tmp_path / "1" / "other" / CONFIG).read_text()) | {"lora_alpha": 4})
    )
    shutil.copytree(golden.FOLDER / "llama_some", tmp_path / "0" / "missing")
    return tmp_path


@pytest.mark.timeout(START_S + 20)
def test_two_processes_serve_the_adapters_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    port = free_port()
    commands = [["tests.multihost.lora_worker", *map(str, (i, 2, port, MESHES, folder))] for i in (0, 1)]
    with processes(*commands) as started:
        monkeypatch.chdir(folder / "0")
        with build() as engine:
            expected = work(engine)
        ends = [(process.communicate(timeout=START_S)[0], process.returncode) for process in started]
    assert [status for _, status in ends] == [0, 0], ends
    assert expected["tokens"][1:3] == [EVERYWHERE.tokens, SOME.tokens]  # as peft computed them
    assert len({tuple(tokens) for tokens in expected["tokens"][:3]}) == 3
    found = json.loads((folder / "found.json").read_text())
    assert set(found) == set(MESHES.split(";"))
    for mesh, said in found.items():
        assert said["work"] == expected | {"recompilations": 0}, mesh
        assert said["afterwards"]["tokens"] == expected["tokens"], mesh
        who = f"process 1 ({socket.gethostname()}): "
        assert said["refused"]["missing"] == f"{who}missing is not a folder with {CONFIG} and adapter_model.safetensors"
        told = r"other has another adapter: its digest is [0-9a-f]{16}, expected [0-9a-f]{16}"
        assert re.fullmatch(re.escape(who) + told, said["refused"]["other"])
        assert said["refused"]["live"] == (
            "an engine of several hosts takes adapters by read_lora only, which all hosts read"
        )
