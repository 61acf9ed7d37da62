"""Hugging Face folder -> our format -> Hugging Face folder: the same tensors, names, types and config."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.hf.files import TensorFiles
from jaxserve.checkpoint.open import open_checkpoint
from jaxserve.checkpoint.orbax import OrbaxCheckpoint
from tests import tiny
from tests.architecture.imports import ROOT
from tests.checkpoint.live_checkpoint import LiveCheckpoint

GOLDEN = ROOT / "tests" / "data" / "golden"
MODELS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return dict(TensorFiles(folder).items())


@pytest.mark.parametrize("model", MODELS)
def test_round_trip(model: str, tmp_path: Path):
    source = GOLDEN / model
    ours = convert(source, tmp_path / "ours")
    back = convert(ours, tmp_path / "back", format="safetensors")
    want, got = tensors_of(source), tensors_of(back)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and np.array_equal(got[name], tensor), name
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with HFCheckpoint(source) as a, open_checkpoint(ours) as b, open_checkpoint(back) as c:
        assert isinstance(b, OrbaxCheckpoint) and isinstance(c, HFCheckpoint)
        assert a.config == b.config == c.config
        assert a.sampling_defaults == b.sampling_defaults == c.sampling_defaults
        for name, entry in b.entries.items():
            whole = tuple(slice(0, n) for n in entry.shape)
            assert np.array_equal(a.read(name, whole), b.read(name, whole)), name


def sharded(tmp_path: Path) -> Path:
    """A model in two files of mixed types, with an index."""
    source = tmp_path / "sharded"
    shutil.copytree(GOLDEN / MODELS[0], source)
    (source / "model.safetensors").unlink()
    tensors = tensors_of(GOLDEN / MODELS[0])
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        entries: dict[str, Any] = {}
        data = b""
        for i, name in enumerate(part):
            array = tensors[name].astype("<f2" if i % 3 == 0 else "<f4")
            entries[name] = {
                "dtype": "F16" if i % 3 == 0 else "F32",
                "shape": array.shape,
                "data_offsets": [len(data), len(data) + array.nbytes],
            }
            data += array.tobytes()
            weight_map[name] = file
        header = json.dumps(entries).encode()
        (source / file).write_bytes(len(header).to_bytes(8, "little") + header + data)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source


def test_shards_and_types_come_back(tmp_path: Path):
    source = sharded(tmp_path)
    back = convert(convert(source, tmp_path / "ours"), tmp_path / "back", format="safetensors")
    want, got = TensorFiles(source), TensorFiles(back)
    assert {n: (want.file_of(n), i.dtype) for n, i in want.infos.items()} == {
        n: (got.file_of(n), i.dtype) for n, i in got.infos.items()
    }
    assert len({i.dtype for i in want.infos.values()}) == 2
    assert all(np.array_equal(want[name], got[name]) for name in want)


def test_to_another_type(tmp_path: Path):
    source = GOLDEN / MODELS[0]
    back = convert(source, tmp_path / "back", format="safetensors", dtype="bfloat16")
    values = json.loads((back / "config.json").read_text())
    assert "bfloat16" in (values.get("dtype"), values.get("torch_dtype"))
    for name, tensor in tensors_of(source).items():
        got = TensorFiles(back)[name]
        assert np.array_equal(got, tensor.astype(got.dtype)) and got.dtype.name == "bfloat16"


def test_interrupted(tmp_path: Path):
    source = sharded(tmp_path)
    out, reports = tmp_path / "back", []

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2 + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, format="safetensors", on_progress=stop)
    with pytest.raises(CheckpointError, match=r"is not whole: \d+ of \d+ tensors are there"):
        open_checkpoint(out)
    with pytest.raises(CheckpointError, match=r"unfinished conversion of .*safetensors.*; asked was .*orbax"):
        convert(source, out)
    first = (out / "model-00001-of-00002.safetensors").stat().st_mtime_ns
    convert(source, out, format="safetensors", on_progress=lambda *p: reports.append(p[1]))
    assert (out / "model-00001-of-00002.safetensors").stat().st_mtime_ns == first
    assert not [p.name for p in out.iterdir() if "partial" in p.name or p.name.endswith(".tmp")]
    want, got = TensorFiles(source), TensorFiles(out)
    assert all(np.array_equal(want[name], got[name]) for name in want)
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(source, out, format="safetensors")


def test_what_has_no_hugging_face_source(tmp_path: Path):
    ours = convert(LiveCheckpoint(tiny.CONFIG), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="ours did not come from a Hugging Face folder"):
        convert(ours, tmp_path / "back", format="safetensors")
    with pytest.raises(CheckpointError, match="format='pickle' is not one of orbax, safetensors"):
        convert(ours, tmp_path / "back", format="pickle")
