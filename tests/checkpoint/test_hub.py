"""Models by name, from a hub on loopback: what is fetched, what is resumed, and every way in which it can fail."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.hub import STAGE, HubName, download_model, parse_hub_name
from tests.architecture.imports import ROOT
from tests.checkpoint.hub_server import Hub, serving

GOLDEN = ROOT / "tests" / "data" / "golden" / "llama"
MODEL = {p.name: p.read_bytes() for p in GOLDEN.iterdir() if p.suffix in (".json", ".safetensors")}
for name in ("golden.json", "config_old_keys.json"):
    MODEL.pop(name, None)
OTHERS = {
    "pytorch_model.bin": b"x" * 9,
    "original/a.safetensors": b"x",
    "consolidated.safetensors": b"x",
    ".gitattributes": b"",
}
NAME = HubName("org/tiny", None, None)


@pytest.fixture
def hub() -> Iterator[Hub]:
    repos = {
        "org/tiny": MODEL | OTHERS,
        "org/ggufs": {"a.gguf": b"GGUF" * 1000, "README.md": b""},
        "org/none": {"x.txt": b""},
    }
    with serving(Hub(repos, revisions=("main", "v2"))) as hub:
        yield hub


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name", None, None)),
        ("Qwen/Qwen2.5-0.5B@main", HubName("Qwen/Qwen2.5-0.5B", "main", None)),
        ("o/n@refs/pr/1", HubName("o/n", "refs/pr/1", None)),
        ("o/n:dir/f-Q4_0.gguf", HubName("o/n", None, "dir/f-Q4_0.gguf")),
        ("o/n@v1:f.gguf", HubName("o/n", "v1", "f.gguf")),
        *((text, None) for text in ("name", "/o/n", "a/b/c", "o/n:f.bin", "../x", "o/", "o/n@", "./n", "o/n\n", "")),
    ],
)
def test_names(text: str, name: HubName | None):
    assert parse_hub_name(text) == name
    assert name is None or str(name) == text


def test_only_what_is_needed_is_fetched(hub: Hub, tmp_path: Path):
    reports: list[tuple[str, int, int]] = []
    folder = download_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path, on_progress=lambda *p: reports.append(p))
    assert hub.fetched() == MODEL.keys()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == MODEL
    assert reports[-1] == (STAGE, 0, 1)  # fewer than 2**20 bytes
    with HFCheckpoint(folder) as checkpoint:
        assert checkpoint.model_name == "org/tiny"
    hub.requests.clear()
    assert download_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path) == folder
    assert not hub.fetched()


def test_revisions(hub: Hub, tmp_path: Path):
    folder = download_model(NAME._replace(revision="v2"), endpoint=hub.endpoint, cache_dir=tmp_path)
    assert folder.name == hub.commit("org/tiny", "v2")
    with pytest.raises(CheckpointError, match=r"org/tiny@v3: http\S+/org/tiny has no revision 'v3'"):
        download_model(NAME._replace(revision="v3"), endpoint=hub.endpoint, cache_dir=tmp_path)


def test_one_file(hub: Hub, tmp_path: Path):
    path = download_model(HubName("org/ggufs", None, "a.gguf"), endpoint=hub.endpoint, cache_dir=tmp_path)
    assert path.read_bytes() == b"GGUF" * 1000 and hub.fetched() == {"a.gguf"}
    with pytest.raises(CheckpointError, match=r"org/ggufs:b\.gguf: .* has no file 'b\.gguf'"):
        download_model(HubName("org/ggufs", None, "b.gguf"), endpoint=hub.endpoint, cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"no safetensors, only 1 \.gguf files: give one, as org/ggufs:a\.gguf"):
        download_model(HubName("org/ggufs", None, None), endpoint=hub.endpoint, cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"org/none: the repository has neither safetensors nor \.gguf files"):
        download_model(HubName("org/none", None, None), endpoint=hub.endpoint, cache_dir=tmp_path)


def test_a_dropped_connection_is_resumed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = "model-00001-of-00002.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # it is 10 MB
    hub.cut_after[file] = 3000
    folder = download_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert (folder / file).read_bytes() == MODEL[file]
    ranges = [r for m, path, r in hub.requests if path.endswith(file) and m == "GET"]
    assert ranges == [None, "bytes=3000-"]


KILLED = """
import sys
from jaxserve.checkpoint.hub import HubName, download_model
download_model(HubName("org/tiny", None, None), endpoint=sys.argv[1], cache_dir=sys.argv[2])
"""


def test_a_killed_download_continues(hub: Hub, tmp_path: Path):
    """What was whole when the process ended is not fetched again."""
    hub.stalled = "model-00002-of-00002.safetensors"
    process = subprocess.Popen([sys.executable, "-c", KILLED, hub.endpoint, tmp_path], cwd=ROOT)
    folder = tmp_path / "models--org--tiny" / "snapshots" / hub.commit("org/tiny", "main")
    deadline = time.monotonic() + 30
    while not (hub.has_stalled.is_set() and folder.is_dir() and len(list(folder.iterdir())) == len(MODEL) - 1):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    file, hub.stalled = hub.stalled, None
    hub.requests.clear()
    assert download_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path) == folder
    assert hub.fetched() == {file}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == MODEL


@pytest.mark.parametrize("token", [None, "bad"])
def test_gated(token: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.gated.add("org/tiny")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError) as caught:
        download_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert str(caught.value) == (
        f"model org/tiny is gated: accept its licence at {hub.endpoint}/org/tiny, then set HF_TOKEN to a token of that "
        "account"
    )
    monkeypatch.setenv("HF_TOKEN", "good")
    assert download_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path).is_dir()


def test_not_found(hub: Hub, tmp_path: Path):
    with pytest.raises(CheckpointError, match=rf"no model org/gone: .* nor known to {hub.endpoint} .*HF_TOKEN"):
        download_model(HubName("org/gone", None, None), endpoint=hub.endpoint, cache_dir=tmp_path)


def test_no_network(hub: Hub, tmp_path: Path):
    """Nobody listens: what is in the cache is served, what is not is one line."""
    folder = download_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        assert download_model(NAME, endpoint=nowhere, cache_dir=tmp_path) == folder
        for name in (HubName("org/other", None, None), HubName("org/other", None, "a.gguf")):
            with pytest.raises(CheckpointError) as caught:
                download_model(name, endpoint=nowhere, cache_dir=tmp_path)
            text = str(caught.value)
            assert text.startswith(f"model {name}: {nowhere} cannot be reached: ") and "\n" not in text
            assert text.endswith("in the cache it is not there")
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match="in the cache it is incomplete"):
            download_model(NAME, endpoint=nowhere, cache_dir=tmp_path)


def test_command_line_online_and_offline(hub: Hub, tmp_path: Path):
    """The name where a path would stand; then the same without asking anybody."""
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "jaxserve", "info", "org/tiny"]

    def run(name: str, **others: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*command[:-1], name], cwd=tmp_path, env=environment | others, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    status, out, err = run("org/tiny")
    assert status == 0 and "LlamaForCausalLM" in out, err
    hub.requests.clear()
    assert run("org/tiny", HF_HUB_OFFLINE="1")[:2] == (0, out)
    status, _, err = run("org/other", HF_HUB_OFFLINE="1")
    assert status == 2
    assert err.splitlines()[-1] == "error: model org/other: in the cache it is not there, and HF_HUB_OFFLINE is set"
    assert not hub.requests
