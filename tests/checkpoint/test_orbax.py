"""Our own format: what goes in comes out, on any mesh and through orbax; what is not whole or not ours is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve import SamplingParams
from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.orbax import OrbaxCheckpoint
from jaxserve.checkpoint.orbax.config_json import config_from_json, config_to_json
from jaxserve.checkpoint.orbax.layout import MAX_CHUNK_BYTES, chunk_shape
from jaxserve.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from jaxserve.model.params import Params, init_params, is_spec, param_specs
from jaxserve.parallel.mesh import make_mesh, parse_mesh
from tests import tiny
from tests.architecture.imports import ROOT
from tests.checkpoint.live_checkpoint import LiveCheckpoint

RICH = replace(
    tiny.CONFIG,
    family="anything",
    ropes=(
        RopeConfig(theta=1e6 / 3, scaling="longrope", factor=4, short_factor=(1.0, 1.1), long_factor=(0.1 + 0.2, 4.0)),
        RopeConfig(rotary_dim=4, interleaved=True),
    ),
    layer_ropes=(0, None, 1, 0),
    layer_windows=(None, 7, None, 9),
    moe=MoEConfig(
        num_experts=4, num_experts_per_tok=2, intermediate_size=16, shared_intermediate_size=8, shared_gate=True
    ),
    moe_layers=(False, True, True, False),
    qkv_bias=True,
    qk_norm="full",
    attn_softcap=50.0,
    attn_scale=None,
)
MLA = replace(
    tiny.CONFIG,
    mla=MLAConfig(q_lora_rank=None, kv_lora_rank=6, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
)


def live(config: ModelConfig = tiny.CONFIG, dtype: Any = np.float32, **options: Any) -> LiveCheckpoint:
    return LiveCheckpoint(config, numpy_params(config, dtype), tiny.tokenizer(), **options)


def numpy_params(config: ModelConfig, dtype: Any = np.float32) -> Params:
    rng = np.random.default_rng(3)
    dtype = np.dtype(dtype)  # jax has told numpy of bfloat16
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(dtype), param_specs(config), is_leaf=is_spec)


def everything(checkpoint: Any) -> dict[str, np.ndarray]:
    return {name: checkpoint.read(name, tuple(slice(0, n) for n in e.shape)) for name, e in checkpoint.entries.items()}


def assert_same(got: dict[str, np.ndarray], want: LiveCheckpoint) -> None:
    for name, array in got.items():
        expected = want.read(name, tuple(slice(0, n) for n in array.shape))
        assert array.dtype == expected.dtype and np.array_equal(array, expected), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, converted; tests change copies of it only."""
    return convert(live(), tmp_path_factory.mktemp("orbax") / "tiny")


@pytest.mark.parametrize("config", [tiny.CONFIG, RICH, MLA], ids=["dense", "rich", "mla"])
def test_config_round_trip(config: ModelConfig):
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(colour=3), r"config\.colour=3 is not known"),
        (lambda c: c["ropes"][0].update(spin="left"), r"config\.ropes\[0\]\.spin='left' is not known"),
        (lambda c: c.pop("vocab_size"), r"config\.vocab_size is missing"),
        (lambda c: c.update(num_layers="four"), r"config\.num_layers must be int, not 'four'"),
        (lambda c: c.update(num_layers=True), r"config\.num_layers must be int, not True"),
        (lambda c: c.update(norm="batch"), r"config\.norm='batch' is not one of 'rms', 'layer'"),
        (lambda c: c.update(ropes={}), r"config\.ropes must be a list"),
        (lambda c: c["moe"].update(num_experts=None), r"config\.moe\.num_experts must be int, not None"),
        (lambda c: c.update(num_kv_heads=3), "num_heads=8 is not divisible by num_kv_heads=3"),
    ],
)
def test_bad_config(change: Any, named: str):
    values = json.loads(json.dumps(config_to_json(RICH)))
    change(values)
    with pytest.raises(CheckpointError, match=named):
        config_from_json(values)


@pytest.mark.parametrize("config", [RICH, MLA, replace(tiny.CONFIG, tie_word_embeddings=True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(config: ModelConfig, dtype: str, tmp_path: Path):
    source = live(config, dtype)
    with OrbaxCheckpoint(convert(source, tmp_path / "out")) as checkpoint:
        assert checkpoint.config == config
        assert_same(everything(checkpoint), source)
        for name in ("architecture", "model_name", "license", "sampling_defaults", "num_params"):
            assert getattr(checkpoint, name) == getattr(source, name)
        assert checkpoint.tensor_types() == {dtype: checkpoint.num_bytes}
        assert checkpoint.num_bytes == checkpoint.num_params * (4 if dtype == "float32" else 2)
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.read("embed", (slice(0, 1), slice(0, 1)))


def test_tokenizer_survives(folder: Path):
    with OrbaxCheckpoint(folder) as checkpoint:
        got, want = checkpoint.tokenizer(), tiny.tokenizer()
    assert got is not None
    text = "Grüße, 世界! <ctl> 👩‍👩‍👧"
    assert got.encode(text) == want.encode(text)
    assert got.decode(got.encode(text), skip_special_tokens=False) == text
    for name in ("vocab_size", "eos_token_ids", "bos_token_id", "prefix_ids", "chat_template"):
        assert getattr(got, name) == getattr(want, name)
    assert got.is_special(1) and not got.is_special(2)


def test_no_tokenizer(tmp_path: Path):
    source = LiveCheckpoint(tiny.CONFIG)
    assert OrbaxCheckpoint(convert(source, tmp_path / "out")).tokenizer() is None


def test_cast(tmp_path: Path):
    source = live()
    with OrbaxCheckpoint(convert(source, tmp_path / "out", dtype="bfloat16")) as checkpoint:
        assert checkpoint.tensor_types().keys() == {"bfloat16"}
        for name, array in everything(checkpoint).items():
            whole = source.read(name, tuple(slice(0, n) for n in array.shape))
            assert np.array_equal(array, whole.astype(array.dtype)), name


def test_cast_that_overflows(tmp_path: Path):
    params = replace(numpy_params(tiny.CONFIG), final_norm=np.full(32, 1e6, np.float32))
    source = LiveCheckpoint(tiny.CONFIG, params)
    with pytest.raises(CheckpointError, match="final_norm has values beyond float16's largest, 65504"):
        convert(source, tmp_path / "out", dtype="float16")


def test_any_part(tmp_path: Path):
    """Arbitrary boxes of arrays of several chunks are what the source has there."""
    config = replace(tiny.CONFIG, vocab_size=1003, hidden_size=512, intermediate_size=1008)
    source = LiveCheckpoint(config)
    rng = np.random.default_rng(0)
    with OrbaxCheckpoint(convert(source, tmp_path / "out")) as checkpoint:
        assert checkpoint.entries["layers.0.gate_up"].chunks == (2, 63, 512)
        for name, entry in checkpoint.entries.items():
            for _ in range(4):
                starts = [int(rng.integers(0, n)) for n in entry.shape]
                index = tuple(slice(a, int(rng.integers(a + 1, n + 1))) for a, n in zip(starts, entry.shape))
                assert np.array_equal(checkpoint.read(name, index), source.read(name, index)), (name, index)


@pytest.mark.parametrize("mesh", ["stage=1,tensor=1", "stage=2,tensor=2", "tensor=4"])
def test_orbax_restores_the_tree(mesh: str, folder: Path):
    """Orbax's own checkpointer, into numpy and onto meshes that the writer knew nothing of."""
    source = live()
    plain = ocp.PyTreeCheckpointer().restore(folder / "params")
    assert len(plain["layers"]) == tiny.CONFIG.num_layers
    sharding = NamedSharding(make_mesh(parse_mesh(mesh)), PartitionSpec("tensor"))
    one = NamedSharding(sharding.mesh, PartitionSpec())

    def argument(x: np.ndarray) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(sharding=one if x.shape[0] % sharding.mesh.shape["tensor"] else sharding)

    placed = ocp.PyTreeCheckpointer().restore(folder / "params", restore_args=jax.tree.map(argument, plain))
    for tree in (plain, placed):
        got = {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): x
               for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}  # fmt: skip
        assert got.keys() == source._shapes.keys()
        assert_same({name: np.asarray(x) for name, x in got.items()}, source)
    assert placed["layers"][0]["qkv"].sharding == sharding
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), plain)
    restored = ocp.StandardCheckpointer().restore(folder / "params", target)
    assert np.array_equal(restored["embed"], plain["embed"])


@pytest.mark.parametrize("mesh", [None, "stage=2,tensor=2"])
def test_an_engine_over_it(mesh: str | None, tmp_path: Path):
    """Straight from the folder onto a mesh, and as the new weights of a running engine."""
    prompts, greedy = tiny.prompts(2), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with tiny.engine() as engine:
        expected = [c.token_ids for c in engine.generate(prompts, greedy)]
    source = LiveCheckpoint(tiny.CONFIG, tiny.params(), tiny.tokenizer())
    with OrbaxCheckpoint(convert(source, tmp_path / "out")) as checkpoint, tiny.engine(mesh=mesh) as engine:
        engine.update_params(init_params(tiny.CONFIG, jax.random.key(8)))
        assert [c.token_ids for c in engine.generate(prompts, greedy)] != expected
        engine.update_params(checkpoint)
        assert [c.token_ids for c in engine.generate(prompts, greedy)] == expected


def test_chunks_follow_the_shards():
    assert chunk_shape((8, 6, 128, 8192), ("kv_heads", None, None, None), 2) == (1, 6, 128, 8192)
    assert chunk_shape((2, 28672, 8192), (None, "ffn", None), 2) == (1, 1792, 8192)
    assert chunk_shape((32,), (None,), 2) == (32,)
    for shape in [(151936, 8192), (50257, 1600), (256, 2, 2048, 7168), (1, 1 << 30)]:
        chunks = chunk_shape(shape, ("vocab",) + (None,) * (len(shape) - 1), 2)
        assert np.prod(chunks) * 2 <= MAX_CHUNK_BYTES
        assert all(1 <= c <= n for c, n in zip(chunks, shape))


# Interruptions.


def test_interrupted_conversion_continues(tmp_path: Path):
    source, out = live(), tmp_path / "out"
    source.fail_at = "layers.2.down"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out)
    with pytest.raises(CheckpointError, match=r"is not whole: 18 of 27 tensors are there; .* continues"):
        OrbaxCheckpoint(out)
    again, progress = live(), []
    again.reads.clear()
    convert(again, out, on_progress=lambda *p: progress.append(p))
    assert "layers.1.down" not in again.reads and "layers.2.down" in again.reads
    assert progress[0] == ("convert", 18, 27) and progress[-1] == ("convert", 27, 27)
    with OrbaxCheckpoint(out) as checkpoint:
        assert_same(everything(checkpoint), again)
    assert {p.name for p in out.iterdir()} == {"jaxserve.json", "jaxserve_tokenizer.json", "params"}


def test_finished_tensor_that_was_damaged_is_written_again(tmp_path: Path):
    source, out = live(), tmp_path / "out"
    source.fail_at = "layers.2.down"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out)
    chunk = out / "params" / "layers.0.down" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with open(out / "jaxserve.partial.log", "ab") as log:
        log.write(b'{"name": "layers.2.do')  # the power went off in the middle of a line
    again = live()
    with OrbaxCheckpoint(convert(again, out)) as checkpoint:
        assert "layers.0.down" in again.reads and "layers.1.down" not in again.reads
        assert_same(everything(checkpoint), again)


KILLED = """
import sys, time
from pathlib import Path
from tests.checkpoint.live_checkpoint import LiveCheckpoint
from tests import tiny
from jaxserve.checkpoint.convert import convert

def stall(stage, done, total):
    if done == 20:
        print("stalled", flush=True)
        time.sleep(60)

convert(LiveCheckpoint(tiny.CONFIG), Path(sys.argv[1]), on_progress=stall)
"""


def test_killed_conversion_continues(tmp_path: Path):
    """And while it runs nobody else may write the same folder."""
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, out], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"stalled\n"
    with pytest.raises(CheckpointError, match="another process is converting into it"):
        convert(LiveCheckpoint(tiny.CONFIG), out)
    process.kill()
    process.communicate()
    with pytest.raises(CheckpointError, match="20 of 27 tensors"):
        OrbaxCheckpoint(out)
    source = LiveCheckpoint(tiny.CONFIG)
    with OrbaxCheckpoint(convert(source, out)) as checkpoint:
        assert "layers.0.qkv" not in source.reads
        assert_same(everything(checkpoint), source)


# What is refused.


def test_existing_checkpoint(tmp_path: Path):
    out = tmp_path / "out"
    convert(live(), out)
    before = (out / "jaxserve.json").read_bytes()
    same = live()
    convert(same, out)
    assert not same.reads  # nothing to do
    with pytest.raises(CheckpointError, match=r"has the checkpoint live \(llama, float32\); asked was other \(llama"):
        convert(live(model_name="other"), out)
    with pytest.raises(CheckpointError, match=r"\(llama, float32\); asked was live \(llama, dtype bfloat16, 27"):
        convert(live(), out, dtype="bfloat16")
    assert (out / "jaxserve.json").read_bytes() == before


def test_other_unfinished_conversion(tmp_path: Path):
    source, out = live(), tmp_path / "out"
    source.fail_at = "layers.2.down"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out)
    with pytest.raises(CheckpointError, match=r"unfinished conversion of live .*as stored.* asked was live .*float16"):
        convert(live(), out, dtype="float16")


def test_places_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file exists and is not a folder"):
        convert(live(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        convert(live(), tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="is not empty: it has 'file'"):
        convert(live(), tmp_path)
    with pytest.raises(CheckpointError, match="dtype='int3' is not one of float32, bfloat16, float16"):
        convert(live(), tmp_path / "out", dtype="int3")


FULL_DISK = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from tests.checkpoint.live_checkpoint import LiveCheckpoint
from tests import tiny
from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.errors import CheckpointError

resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    convert(LiveCheckpoint(replace(tiny.CONFIG, vocab_size=1000), model_name="big"), Path(sys.argv[1]))
except CheckpointError as e:
    print(e)
"""


def test_write_error_of_the_disk(tmp_path: Path):
    """A file that cannot grow, as on a full disk: one line, and nothing that passes for a checkpoint."""
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, out], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{out}/params/embed: cannot be written: ") and done.stdout.count("\n") == 1
    assert "File too large" in done.stdout
    with pytest.raises(CheckpointError, match="0 of 27 tensors are there"):
        OrbaxCheckpoint(out)
    source = LiveCheckpoint(replace(tiny.CONFIG, vocab_size=1000), model_name="big")
    with OrbaxCheckpoint(convert(source, out)) as checkpoint:
        assert_same(everything(checkpoint), source)


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"at least \d+ bytes are to be written, the disk has 1000 free"):
        convert(live(), tmp_path / "out")


def copied(folder: Path, to: Path, change: Any) -> Path:
    shutil.copytree(folder, to)
    manifest = json.loads((to / "jaxserve.json").read_text())
    change(manifest)
    (to / "jaxserve.json").write_text(json.dumps(manifest))
    return to


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(format_version=2), "format_version is 2, this version of jaxserve reads 1"),
        (lambda m: m.update(format="other"), "is not of a jaxserve checkpoint"),
        (lambda m: m.update(quantized="int4"), "'quantized' is not known to this version"),
        (lambda m: m["config"].update(new_flag=1), r"config\.new_flag=1 is not known"),
        (lambda m: m["config"].update(num_layers=10**12), "num_layers=1000000000000, but there are only 27 parameters"),
        (lambda m: m["params"].pop("embed"), r"parameter embed is missing, expected shape \(259, 32\)"),
        (lambda m: m["params"].update(extra=m["params"]["embed"]), "'extra' is not a parameter of this model"),
        (lambda m: m["params"]["embed"].update(shape=[259, 33]), r"embed has shape \(259, 33\), expected \(259, 32\)"),
        (lambda m: m["params"]["embed"].update(dtype="int8"), "embed is of int8, expected a float type"),
        (lambda m: m["params"]["embed"].update(chunks=[0, 32]), "embed: shape .* do not fit"),
        (lambda m: m["params"]["embed"].update(dtype="bfloat16"), "embed/0.0 has 33152 bytes, expected 16576"),
        (lambda m: m.update(params=[]), r"params is \[\], expected dict"),
    ],
)
def test_bad_manifest(change: Any, named: str, folder: Path, tmp_path: Path):
    path = copied(folder, tmp_path / "bad", change)
    with pytest.raises(CheckpointError, match=named) as caught:
        OrbaxCheckpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_folder(folder: Path, tmp_path: Path):
    path = copied(folder, tmp_path / "bad", lambda m: None)
    (path / "params" / "layers.1.qkv" / "0.0.0.0").unlink()
    with pytest.raises(CheckpointError, match=r"parameter layers\.1\.qkv: .*0\.0\.0\.0 is missing"):
        OrbaxCheckpoint(path)
    (path / "params" / "layers.1.qkv" / ".zarray").unlink()
    with pytest.raises(CheckpointError, match=r"\.zarray is missing"):
        OrbaxCheckpoint(path)
    (path / "jaxserve.json").write_bytes((folder / "jaxserve.json").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not JSON"):
        OrbaxCheckpoint(path)
    (path / "jaxserve.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not a jaxserve checkpoint: it has no jaxserve\.json"):
        OrbaxCheckpoint(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ('{"format_version": 9}', "format_version is not 1"),
        ('{"format_version": 1, "eos_token_ids": "x"}', "eos_token_ids='x' is not a list of integers"),
    ],
)
def test_bad_tokenizer(text: str, named: str, folder: Path, tmp_path: Path):
    path = copied(folder, tmp_path / "bad", lambda m: None)
    (path / "jaxserve_tokenizer.json").write_text(text)
    with OrbaxCheckpoint(path) as checkpoint, pytest.raises(CheckpointError, match=named):
        checkpoint.tokenizer()
