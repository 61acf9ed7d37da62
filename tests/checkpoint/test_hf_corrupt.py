"""Truncated, corrupt and hostile Hugging Face folders: one clear line each, never another exception, memory or time."""

import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint import CheckpointError, HFCheckpoint
from jaxserve.checkpoint.hf.config import read_hf_config
from jaxserve.checkpoint.hf.safetensors_header import read_header
from jaxserve.model.params import named_leaves, param_specs
from tests.checkpoint.tiny_hf import CASES, llama, safetensors, write_folder

HUGE = 2**60
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
CONFIGS = {name: case()[0] for name, case in CASES.items()}
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def content() -> bytes:
    """A valid model.safetensors."""
    return safetensors(llama()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config, tensors, _ = llama()
    return write_folder(tmp_path, config, tensors)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    config, tensors, _ = llama()
    return write_folder(tmp_path, config, tensors, shards=2)


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails a test that computes for a second or allocates 10 MB."""
    tracemalloc.start()
    start = time.process_time()
    yield
    elapsed, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert elapsed < 1 and peak < 10e6


def load_all(folder: Path) -> str | None:
    """Opens and reads everything; the error's text, None for a valid folder."""
    try:
        with HFCheckpoint(folder) as checkpoint:
            for name, spec in named_leaves(param_specs(checkpoint.config)):
                checkpoint.read(name, tuple(slice(0, n) for n in spec.shape))
    except CheckpointError as e:
        assert str(e).startswith(str(folder)) and "\n" not in str(e) and len(str(e)) < len(str(folder)) + 700
        return str(e)
    return None


def header_of(text: str | bytes, data: bytes = b"") -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(data: int = 8, **tensors: Any) -> bytes:
    return header_of(json.dumps(tensors), bytes(data))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "short": (b"1234", "the header's length needs 8 bytes, the file has 4"),
    "header's length": (HUGE.to_bytes(8, "little"), f"a header of {HUGE} bytes is not believed"),
    "header past the end": (header_of(b"{}")[:-1], r"the header needs bytes 8\.\.10, the file has 9"),
    "no header": (bytes(8), "the header is not valid JSON"),
    "not JSON": (header_of("{"), "the header is not valid JSON: Expecting property name"),
    "not an object": (header_of("[1, 2]"), r"the header is not a JSON object but \[1, 2\]"),
    "not UTF-8": (header_of(b'{"\xff": 1}'), "the header is not valid JSON: 'utf-8' codec"),
    "deep": (header_of("[" * 100_000), "the header is nested too deeply"),
    "deep object": (header_of('{"a":' * 100_000), "the header is nested too deeply"),
    "NaN": (header_of('{"a": NaN}'), "the header is not valid JSON: NaN is not a JSON number"),
    "digits": (header_of('{"a": ' + "9" * 10_000 + "}"), "the header is not valid JSON: Exceeds the limit"),
    "twice": (header_of('{"a": 1, "b": 1, "a": 2}'), "the header is not valid JSON: key 'a' appears twice"),
    "entry": (file_of(a=[1]), r"tensor 'a' is \[1\], expected its dtype, shape and data_offsets"),
    "entry's keys": (file_of(a=entry() | {"x": 1}), "tensor 'a' is <object of 4 keys>, expected"),
    "long name": (file_of(**{"n" * 5000: 1}), r"tensor 'n+\.\.\. is 1, expected"),
    "dtype": (file_of(a=entry("F31")), "tensor 'a' has unknown dtype 'F31'"),
    "dtype's type": (file_of(a=entry(["F32"])), r"tensor 'a' has unknown dtype \['F32'\]"),
    "shape": (file_of(a=entry(shape=[-1])), r"tensor 'a' has shape \[-1\], expected at most 16 sizes"),
    "shape, float": (file_of(a=entry(shape=[2.0])), r"tensor 'a' has shape \[2.0\]"),
    "shape, true": (file_of(a=entry(shape=[True])), r"tensor 'a' has shape \[True\]"),
    "dimensions": (file_of(a=entry(shape=[1] * 17)), "tensor 'a' has shape <list of 17>"),
    "sizes": (file_of(a=entry(shape=[2**62] * 16)), r"in F32 needs <integer of \d+ bits> bytes, it has 8"),
    "offsets": (file_of(a=entry(offsets=[8, 0])), r"tensor 'a' has data_offsets \[8, 0\], expected a start and an end"),
    "one offset": (file_of(a=entry(offsets=[0])), r"tensor 'a' has data_offsets \[0\]"),
    "past the end": (
        file_of(a=entry(offsets=[0, HUGE])),
        rf"tensor 'a' needs bytes 87\.\.{HUGE + 87}, the file has 95",
    ),
    "size": (file_of(a=entry(shape=[3])), r"tensor 'a' of shape \[3\] in F32 needs 12 bytes, it has 8"),
    "overlap": (file_of(a=entry(), b=entry(shape=[1], offsets=[4, 8])), "tensors 'a' and 'b' overlap at byte 134"),
    "same place": (file_of(a=entry(), b=entry()), "tensors 'a' and 'b' overlap"),
    "gap": (file_of(16, a=entry(), b=entry(shape=[1], offsets=[12, 16])), r"bytes \d+\.\.\d+ before tensor 'b' belong"),
    "rest": (file_of(9, a=entry()), "the tensors end at byte 77, the file has 78"),
    "cut": (file_of(7, a=entry()), r"tensor 'a' needs bytes 69\.\.77, the file has 76"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_one_line_and_cost_nothing(folder, bounded, case):
    data, complaint = HOSTILE[case]
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=complaint) as error:
        HFCheckpoint(folder)
    assert str(error.value).startswith(f"{folder / 'model.safetensors'}: ") and "\n" not in str(error.value)


def test_an_empty_file_and_an_empty_tensor(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is empty"):
        HFCheckpoint(folder)
    tensors = read_header(memoryview(file_of(8, none=entry(shape=[0, 4], offsets=[8, 8]), a=entry())))
    assert tensors["none"].num_bytes == 0 and tensors["a"].shape == (2,)


@FUZZ
@given(data=st.data())
def test_a_file_cut_anywhere_is_an_error(content, folder, data):
    length = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 12))
    (folder / "model.safetensors").write_bytes(content[:length])
    assert "truncated or corrupt" in (load_all(folder) or "") or length == 0


def test_a_header_cut_at_many_places_is_an_error(content, folder):
    for length in range(0, int.from_bytes(content[:8], "little") + 9, 41):
        (folder / "model.safetensors").write_bytes(content[:length])
        assert load_all(folder) is not None


@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_any_flipped_bytes_are_an_error_or_a_valid_file(content, folder, data):
    changed = bytearray(content)
    header_end = 8 + int.from_bytes(content[:8], "little")
    place = st.one_of(st.integers(0, len(content) - 1), st.integers(8, header_end), st.integers(0, 8))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=3)):
        changed[at] = value
    (folder / "model.safetensors").write_bytes(bytes(changed))
    load_all(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(FUZZ, max_examples=150)
@given(data=st.data())
def test_any_value_of_any_key_of_any_config_is_an_error_or_understood(data):
    values = dict(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))])
    hostile = JSON | st.sampled_from([HUGE, -1, 0, 1e308, float("inf"), float("nan"), [], {}, 10**5000, "x" * 1000])
    keys = [*values, "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "eos_token_id", "rope_theta"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
        values[key] = data.draw(hostile)
    try:
        read_hf_config(values)
    except CheckpointError as e:
        assert "\n" not in str(e) and len(str(e)) < 700


@FUZZ
@given(scaling=st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "original_max_position_embeddings", "short_factor", "mscale",
                     "mscale_all_dim", "attention_factor", "beta_fast", "truncate", "rope_theta"]),
    JSON | st.sampled_from(["yarn", "linear", "llama3", "longrope", "default", 1, 2.0, HUGE, 1e-300, 1e300]),
))  # fmt: skip
def test_any_rope_is_an_error_or_understood(scaling):
    for name in ("llama", "phi3", "deepseek_v3", "gemma2"):
        try:
            read_hf_config(CONFIGS[name] | {"rope_scaling": scaling})
        except CheckpointError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "config.json is not valid JSON: Expecting value"),
        (b"\xff\xfe", "config.json is not valid JSON: 'utf-8' codec"),
        (b"[" * 200_000, "config.json is nested too deeply"),
        (b'{"hidden_size": NaN}', "config.json is not valid JSON: NaN is not a JSON number"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "key 'hidden_size' appears twice"),
        (b'{"architectures": ["LlamaForCausalLM"]}', "config.json: hidden_size is missing"),
        (b"7", "config.json is not a JSON object but 7"),
    ],
)
def test_a_malformed_config_is_named(folder, bounded, text, complaint):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=complaint):
        HFCheckpoint(folder)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: No such file"):
        HFCheckpoint(tmp_path)


def test_sizes_that_no_file_bears_out_cost_nothing(folder, bounded):
    values = json.loads((folder / "config.json").read_text())
    for sizes in ({"vocab_size": 2**31 - 1}, {"num_hidden_layers": 512}, {"hidden_size": 2**30, "head_dim": 4}):
        (folder / "config.json").write_text(json.dumps(values | sizes))
        with pytest.raises(CheckpointError, match=r"is missing, expected shape|has shape \(19, 12\), expected"):
            HFCheckpoint(folder)


def test_experts_that_no_file_bears_out_cost_nothing(tmp_path, bounded):
    config, tensors, _ = CASES["mixtral"]()
    write_folder(tmp_path, config | {"num_local_experts": 65_536}, tensors)
    with pytest.raises(CheckpointError, match=r"gate.weight' has shape \(3, 12\), expected \(65536, 12\)"):
        HFCheckpoint(tmp_path)


def changed(name: str, value: np.ndarray | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config, tensors, _ = llama()
    tensors = {n: x for n, x in tensors.items() if n != name} | ({} if value is None else {name: value})
    return config, tensors


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        (Q, None, rf"tensor '{Q}' is missing, expected shape \(24, 12\)"),
        (Q, np.ones((12, 24), np.float32), rf"tensor '{Q}' has shape \(12, 24\), expected \(24, 12\)"),
        (Q, np.ones((24, 12), np.int32), rf"tensor '{Q}' of type I32 cannot be read"),
        ("lm_head.weight", None, r"tensor 'lm_head.weight' is missing, expected shape \(19, 12\)"),
        ("model.embed_tokens.weight", None, r"tensor 'model.embed_tokens.weight' is missing"),
        ("model.layers.2.mlp.up_proj.weight", np.ones((2, 3), np.float32), r"up_proj\S+ of shape \(2, 3\) is not one"),
        ("vision.conv", np.ones(1, np.float32), r"tensor 'vision.conv' of shape \(1,\) is not one of a llama model"),
        ("model.layers.0.self_attn.q_proj.bias", np.ones(24, np.float32), r"bias' of shape \(24,\) is not one of"),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_extra_or_misshapen_are_named(tmp_path, name, value, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        HFCheckpoint(write_folder(tmp_path, *changed(name, value)))


def test_one_expert_of_many_is_named(tmp_path):
    config, tensors, _ = CASES["qwen2_moe"]()
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.experts.2.up_proj.weight' is missing"):
        HFCheckpoint(write_folder(tmp_path, config, tensors))


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (b"{", "index.json is not valid JSON"),
        (b"{}", "weight_map=None is not an object of tensors"),
        (b'{"weight_map": {}}', "weight_map=<object of 0 keys> is not an object"),
        (b'{"weight_map": {"a": 1}}', r"weight_map\['a'\]=1 is not a .safetensors file"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', r"weight_map\['a'\]='../x.safetensors' is not a"),
        (b'{"weight_map": {"a": "/etc/x.safetensors"}}', r"weight_map\['a'\]='/etc/x.safetensors' is not a"),
        (b'{"weight_map": {"a": "\\ud800.safetensors"}}', r"'.ud800.safetensors' is not a file name"),
        (b'{"weight_map": {"a": "x.bin"}}', r"weight_map\['a'\]='x.bin' is not a"),
        (b'{"weight_map": {"a": "x.safetensors"}}', r"x.safetensors: cannot be read: No such file"),
        (b'{"weight_map": {"a": "' + b"x" * 5000 + b'.safetensors"}}', r"cannot be read: File name too long"),
        (f'{{"weight_map": {{"a": "{FIRST}"}}}}'.encode(), f"{FIRST} has tensor '.*', which {INDEX} says is nowhere"),
    ],
)
def test_a_malformed_index_is_named(sharded, bounded, index, complaint):
    (sharded / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=complaint):
        HFCheckpoint(sharded)


def test_an_index_and_its_files_agree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    name = next(n for n, f in index["weight_map"].items() if f == FIRST)
    second = FIRST.replace("00001-of", "00002-of")
    moved = index["weight_map"] | {name: second}
    (sharded / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=f"{FIRST} has tensor '{name}', which {INDEX} says is in {second}"):
        HFCheckpoint(sharded)
    (sharded / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"more": second}}))
    with pytest.raises(CheckpointError, match=f"{second} has no tensor 'more', which {INDEX} says it has"):
        HFCheckpoint(sharded)
    (sharded / INDEX).write_text(json.dumps(index))
    (sharded / second).write_bytes((sharded / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match=f"tensor '.*' is in both {FIRST} and {second}"):
        HFCheckpoint(sharded)


def test_files_that_could_be_either_are_named(sharded):
    (sharded / "model.safetensors").write_bytes((sharded / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match=f"holds both model.safetensors and {INDEX}, which lists other files"):
        HFCheckpoint(sharded)
    (sharded / "model.safetensors").unlink()
    (sharded / INDEX).unlink()
    with pytest.raises(
        CheckpointError, match=rf"must hold model.safetensors, or {INDEX} and its files, it holds: '{FIRST}"
    ):
        HFCheckpoint(sharded)
