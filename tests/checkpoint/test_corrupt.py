"""Truncated, corrupt and hostile GGUF files: one clear line each, never another exception, never memory or time."""

import shutil
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint import CheckpointError, GGUFCheckpoint
from tests.checkpoint.gguf_cases import CASES
from tests.checkpoint.tiny_gguf import read_params, weights, write

HUGE = 2**60
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid file whose matrices are quantized."""
    types = {n: gguf.GGMLQuantizationType.Q8_0 for n, a in weights().items() if a.ndim == 2}
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", types=types).read_bytes()


@pytest.fixture(scope="module")
def data_start(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> int:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    path.write_bytes(content)
    return min(t.start for t in GGUFCheckpoint(path).tensors.values())


def load_all(path: Path, data: bytes) -> str | None:
    """Opens and loads everything; the error's text, None for a valid file."""
    path.write_bytes(data)
    try:
        with GGUFCheckpoint(path) as checkpoint:
            checkpoint.tokenizer()
            read_params(checkpoint)
    except CheckpointError as e:
        assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
        return str(e).removeprefix(f"{path}: ")
    return None


def test_the_file_itself_is_valid(content, tmp_path):
    assert load_all(tmp_path / "m.gguf", content) is None


@FUZZ
@given(data=st.data())
def test_a_file_cut_anywhere_is_an_error(content, tmp_path, data):
    length = data.draw(st.integers(0, len(content) - 1))
    error = load_all(tmp_path / "m.gguf", content[:length])
    assert error is not None
    if length >= 4:
        assert error.startswith("truncated or corrupt: ")
    else:
        assert "byte 0" in error or "empty" in error


def test_a_header_cut_at_many_places_is_an_error(content, data_start, tmp_path):
    for length in range(0, data_start, 31):
        assert load_all(tmp_path / "m.gguf", content[:length]) is not None


def test_cut_tensor_data_names_the_tensor_and_its_bytes(content, data_start, tmp_path):
    (tmp_path / "whole.gguf").write_bytes(content)
    with GGUFCheckpoint(tmp_path / "whole.gguf") as checkpoint:
        tensor = checkpoint.tensors["blk.1.attn_k.weight"]
    length = tensor.start + 5
    error = load_all(tmp_path / "m.gguf", content[:length])
    end = tensor.start + tensor.num_bytes
    assert error == (
        f"truncated or corrupt: tensor 'blk.1.attn_k.weight' needs bytes {tensor.start}..{end}, the file has {length}"
    )


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_any_flipped_bytes_are_an_error_or_a_valid_file(content, data_start, tmp_path, data):
    changed = bytearray(content)
    place = st.one_of(st.integers(0, len(content) - 1), st.integers(0, data_start - 1), st.integers(0, 40))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=3)):
        changed[at] = value
    load_all(tmp_path / "m.gguf", bytes(changed))


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Valid files with experts, latents, windows, and factors of rotary frequencies."""
    path, names = tmp_path_factory.mktemp("gguf") / "m.gguf", ("deepseek2, V3", "gpt-oss", "phi3, longrope", "gemma3")
    files = []
    for case in (CASES[name] for name in (*names, "mixtral, one tensor an expert", "olmo3", "glm4moe")):
        tensors = case.tensors(case.params())
        files.append(write(path, arch=case.arch, arch_keys=case.arch_keys(), tensors=tensors).read_bytes())
    return files


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_other_architectures_survive_changed_keys(contents, tmp_path, data):
    """What most files of an architecture have in common is before their tokenizer: the keys that make its config."""
    content = data.draw(st.sampled_from(contents))
    changed = bytearray(content)
    end = content.index(b"tokenizer.ggml.model")
    if data.draw(st.booleans()):
        at, value = data.draw(st.integers(24, end)), data.draw(st.sampled_from([0, 1, 3, 2**31, 2**32 - 1]))
        changed[at : at + 4] = value.to_bytes(4, "little")
    else:
        infos = content.index(b"token_embd.weight")
        place = st.one_of(st.integers(24, end), st.integers(infos, min(infos + 3000, len(content) - 1)))
        changed[data.draw(place)] = data.draw(st.integers(0, 255))
    load_all(tmp_path / "m.gguf", bytes(changed))


@FUZZ
@given(data=st.data())
def test_any_number_written_anywhere_in_the_header_is_survived(content, data_start, tmp_path, data):
    changed = bytearray(content)
    at = data.draw(st.integers(4, data_start - 8))
    value = data.draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, HUGE, 2**63, 2**64 - 1, len(content)]))
    changed[at : at + 8] = value.to_bytes(8, "little")
    load_all(tmp_path / "m.gguf", bytes(changed))


@FUZZ
@given(data=st.binary(max_size=200))
def test_random_bytes_after_the_magic_are_an_error(tmp_path, data):
    assert load_all(tmp_path / "m.gguf", b"GGUF" + struct.pack("<I", 3) + data) is not None


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(num_tensors: int, num_keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest


def tensor_info(
    name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0, num_dims: int | None = None
) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape) if num_dims is None else num_dims, *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


U32, STRING, ARRAY, BOOL = 4, 8, 9, 7
HOSTILE = {
    "no file": (b"", "the file is empty"),
    "other format": (b"PK\x03\x04 a zip file", r"not a GGUF file: byte 0 starts b'PK\\x03\\x04'"),
    "short magic": (b"GG", "not a GGUF file: byte 0"),
    "only magic": (b"GGUF", r"the version needs bytes 4\.\.8, the file has 4"),
    "version 1": (header(0, 0, version=1), "byte 4: GGUF version 1 is not supported"),
    "version 9": (header(0, 0, version=9), "byte 4: GGUF version 9 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "byte 4: a big-endian file is not supported"),
    "keys": (header(0, HUGE), rf"{HUGE} metadata keys at byte 24 need at least"),
    "tensors": (header(HUGE, 0), rf"{HUGE} tensor infos at byte 24 need at least"),
    "key length": (header(0, 1, struct.pack("<Q", HUGE) + bytes(20)), rf"metadata key 0 needs bytes 32\.\.{HUGE + 32}"),
    "string length": (
        header(0, 1, text("a.b") + struct.pack("<IQ", STRING, HUGE)),
        rf"metadata 'a\.b' needs bytes 47\.\.{HUGE + 47}, the file has 47",
    ),
    "string array": (
        header(0, 1, text("a") + struct.pack("<IIQ", ARRAY, STRING, HUGE)),
        "strings of metadata 'a' at byte",
    ),
    "number array": (header(0, 1, text("a") + struct.pack("<IIQ", ARRAY, U32, HUGE)), "metadata 'a' needs bytes"),
    "nested array": (
        header(0, 1, text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 2) + bytes(64)),
        "metadata 'a' has unknown or nested value type 9",
    ),
    "value type": (header(0, 1, text("a") + struct.pack("<I", 77)), "metadata 'a' has unknown or nested value type 77"),
    "bool": (header(0, 1, text("a") + struct.pack("<IB", BOOL, 2)), "byte 37: metadata 'a' is neither true nor false"),
    "text": (
        header(0, 1, text("a") + struct.pack("<IQ", STRING, 2) + b"x\xff"),
        "byte 46: metadata 'a' is not UTF-8",
    ),
    "twice": (
        header(0, 2, 2 * (text("abc") + struct.pack("<II", U32, 1))),
        "byte 43: metadata key 'abc' appears twice",
    ),
    "alignment": (
        header(0, 1, text("general.alignment") + struct.pack("<II", U32, 3)),
        "general.alignment=3 is not a power of two",
    ),
    "no dimensions": (header(1, 0, tensor_info("t", ()) + bytes(8)), "tensor 't' has 0 dimensions, expected 1 to 4"),
    "dimensions": (header(1, 0, tensor_info("t", (1,), num_dims=2**32 - 1)), "tensor 't' has 4294967295 dimensions"),
    "tensor size": (
        header(1, 0, tensor_info("t", (2**63, 2**63, 2**63, 2**63))),
        r"tensor 't' needs bytes 96\.\.\d+, the file has 81",
    ),
    "empty tensor": (header(1, 0, tensor_info("t", (4, 0))), r"tensor 't' of shape \(0, 4\) is not made of F32 rows"),
    "half a block": (header(1, 0, tensor_info("t", (33,), kind=8)), "is not made of Q8_0 rows of 32-element blocks"),
    "tensor type": (header(1, 0, tensor_info("t", (4,), kind=4096)), "tensor 't' has unknown type 4096"),
    "tensor twice": (header(2, 0, 2 * tensor_info("t", (4,))), "byte 57: tensor 't' appears twice"),
    "unaligned": (
        header(1, 0, tensor_info("t", (4,), offset=8) + bytes(64)),
        "starts at byte 72, not at a multiple of 32",
    ),
    "far away": (header(1, 0, tensor_info("t", (4,), offset=HUGE)), f"tensor 't' needs bytes {HUGE + 64}"),
    "overlap": (
        header(2, 0, tensor_info("s", (16,)) + tensor_info("t", (4,), offset=32) + bytes(256)),
        "tensors 's' and 't' overlap at byte 128",
    ),
    "nothing": (header(0, 0), "metadata 'general.architecture' is missing"),
}


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails a test that computes for a second or allocates 10 MB."""
    tracemalloc.start()
    start = time.process_time()
    yield
    elapsed, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert elapsed < 1 and peak < 10e6


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_one_line_and_cost_nothing(tmp_path, bounded, case):
    data, complaint = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=complaint):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder, not a GGUF file"):
        GGUFCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.gguf: cannot be read: No such file"):
        GGUFCheckpoint(tmp_path / "none.gguf")


def test_infinite_and_nan_weights_are_loaded_without_a_warning(content, data_start, tmp_path, recwarn):
    shutil.copyfile(write(tmp_path / "a.gguf"), tmp_path / "m.gguf")
    changed = bytearray(content)
    changed[data_start:] = b"\xff" * (len(changed) - data_start)  # every block scale is NaN
    assert load_all(tmp_path / "m.gguf", bytes(changed)) is None
    assert not recwarn.list
    with GGUFCheckpoint(tmp_path / "m.gguf") as checkpoint:
        assert np.isnan(checkpoint.load_tensor("token_embd.weight")).all()
