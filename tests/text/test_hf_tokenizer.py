"""Tokenizers from Hugging Face folders: which file decides what, refusals by name, and files that are broken."""

import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.text import hf_tokenizer
from jaxserve.text.chat_template import ChatTemplateError
from jaxserve.text.decoding import TokenizerError
from jaxserve.text.hf_tokenizer import tokenizer_from_folder
from jaxserve.text.tokenizer import Tokenizer
from tests.text.metadata import MERGES, TEXTS

DATA = Path(__file__).resolve().parents[1] / "data"
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
MESSAGES = [{"role": "user", "content": "hi"}]


def byte_level(*, prefix: bool = False, suffix: bool = False, split: bool = False) -> tokenizers.Tokenizer:
    """Ids: 0 to 255 the bytes' characters, the merged tokens, bos, eos, pad."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
    merges = [tuple(m.split(" ")) for m in MERGES]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in (BOS, EOS, PAD)])
    parts = [*([BOS] if prefix else []), "$A", *([EOS] if suffix else [])]
    special = [(t, backend.token_to_id(t)) for t in (BOS, EOS)]
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=parts, special_tokens=special)]
    )
    return backend


def spm_style() -> tokenizers.Tokenizer:
    """Llama 2's parts: a space in front of each text, bytes for what has no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    merges = [("\u2581", "a"), ("a", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return backend


def folder(path: Path, backend: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    """Writes ``tokenizer.json`` and other files, named with ``__`` for the dot."""
    path.mkdir(exist_ok=True)
    if backend is not None:
        (path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def load(path: Path, *eos: int) -> Tokenizer:
    tokenizer = tokenizer_from_folder(path, eos)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, spm_style])
@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
def test_ids_and_text_are_the_library_s(make, text):
    backend = make()
    tokenizer = Tokenizer.from_backend(backend, eos_token_ids=())
    ids = backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == ids
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == backend.decode(ids, skip_special_tokens=skip)
    assert tokenizer.min_num_tokens(text) <= len(ids)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert tokenizer_from_folder(folder(tmp_path, config__json={}, tokenizer_config__json={"bos_token": "x"}), (1,)) is None


def test_special_tokens_come_from_the_config_and_the_map(tmp_path):
    config = {"bos_token": BOS, "eos_token": {"__type": "AddedToken", "content": EOS}, "extra_special_tokens": {"x_token": "<x>"}}
    path = folder(tmp_path, byte_level(), tokenizer_config__json=config, special_tokens_map__json={"pad_token": PAD})
    tokenizer = load(path, 3)
    bos, eos, pad = (tokenizer.encode(t)[0] for t in (BOS, EOS, PAD))
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (bos, pad)
    assert tokenizer.eos_token_ids == (3, eos)  # the model's, then the tokenizer's own
    assert load(path, eos).eos_token_ids == (eos,)
    assert tokenizer.is_special(pad) and not tokenizer.is_special(3)


@pytest.mark.parametrize(
    ("prefix", "config", "expected"),
    [
        (False, {}, 0),
        (True, {}, 1),
        (True, {"add_bos_token": False}, 0),
        (False, {"add_bos_token": True}, 1),
        (True, {"add_bos_token": None}, 1),
        (False, {"add_bos_token": True, "bos_token": None}, 0),
    ],
)
def test_what_goes_before_a_text(tmp_path, prefix, config, expected):
    path = folder(tmp_path, byte_level(prefix=prefix), tokenizer_config__json={"bos_token": BOS} | config)
    tokenizer = load(path, 3)
    assert tokenizer.encode("ab") == [tokenizer.bos_token_id] * expected + tokenizer.encode("ab", add_special_tokens=False)


@pytest.mark.parametrize("config", [{}, {"add_eos_token": True}])
def test_a_tokenizer_that_ends_the_prompt_is_refused(tmp_path, config):
    path = folder(tmp_path, byte_level(suffix=not config), tokenizer_config__json=config)
    with pytest.raises(TokenizerError, match="adds tokens after the text|add_eos_token=true"):
        load(path)


def test_truncation_and_padding_are_turned_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    assert len(load(folder(tmp_path, backend), 3).encode("1234567")) == 6  # 12 is a token


def test_tokens_that_only_the_other_files_have_are_added(tmp_path):
    size = byte_level().get_vocab_size()
    config = {"added_tokens_decoder": {str(size): {"content": "<tool>", "special": False, "lstrip": True}}}
    path = folder(tmp_path, byte_level(), tokenizer_config__json=config, added_tokens__json={"<more>": size + 1})
    tokenizer = load(path, 3)
    assert tokenizer.encode("a  <tool><more>") == [*tokenizer.encode("a"), size, size + 1]  # it swallows the spaces
    assert tokenizer.min_num_tokens("a" * 999) == 0
    assert tokenizer.decode([size, size + 1]) == "<tool><more>"


def test_tokens_named_in_the_config_become_special(tmp_path):
    config = {"eos_token": "ab", "additional_special_tokens": ["abc"], "pad_token": "not there"}
    tokenizer = load(folder(tmp_path, byte_level(), tokenizer_config__json=config))
    ab, abc = tokenizer.encode("ab"), tokenizer.encode("abc")
    assert [len(ab), len(abc)] == [1, 1]
    assert tokenizer.is_special(ab[0]) and tokenizer.is_special(abc[0])
    assert tokenizer.pad_token_id is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config__json": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config__json": {"chat_template": "one"}, "chat_template__jinja": "two"}, "two"),
        ({"chat_template__json": {"chat_template": "three"}}, "three"),
        (
            {"tokenizer_config__json": {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}},
            "d",
        ),
        ({"tokenizer_config__json": {"chat_template": "{{ bos_token }}{{ eos_token }}{{ x_token }}", "bos_token": BOS,
                                     "eos_token": EOS, "extra_special_tokens": {"x_token": "<x>"}}}, f"{BOS}{EOS}<x>"),
    ],
)  # fmt: skip
def test_where_the_chat_template_comes_from(tmp_path, files, expected):
    assert load(folder(tmp_path, byte_level(), **files), 3).render_chat(MESSAGES) == expected


def test_a_folder_of_templates(tmp_path):
    path = folder(tmp_path, byte_level(), chat_template__jinja="d")
    folder(path / "additional_chat_templates", tool_use__jinja="t")
    tokenizer = load(path, 3)
    assert tokenizer.render_chat(MESSAGES, tools=[{"name": "f"}]) == "t"
    assert tokenizer.render_chat(MESSAGES) == "d"


def test_no_template_is_an_error_of_chats_only(tmp_path):
    tokenizer = load(folder(tmp_path, byte_level()), 3)
    assert tokenizer.chat_template is None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.render_chat(MESSAGES)


def with_json(**changes: Any) -> str:
    return json.dumps(json.loads(byte_level().to_str()) | changes)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"tokenizer__json": "{"}, "tokenizer.json: the tokenizer library refused"),
        ({"tokenizer__json": "[" * 99999}, "tokenizer.json: the tokenizer library refused"),
        ({"tokenizer__json": with_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]})}, "out of vocabulary"),
        ({"tokenizer__json": with_json(model={"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []})}, "token id 4294967295"),
        ({"tokenizer__json": with_json(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})}, "WordPiece"),
        ({"tokenizer__json": with_json(decoder=None)}, "has no decoder"),
        (
            {"tokenizer__json": with_json(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 99})},
            "normalizer inserts 99 characters, at most 64",
        ),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json: must hold an object, not list"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config__json": "[" * 99999}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config__json": {"bos_token": 7}}, "bos_token must be a token, not 7"),
        ({"tokenizer_config__json": {"add_bos_token": "yes"}}, "add_bos_token must be a bool, not 'yes'"),
        ({"tokenizer_config__json": {"chat_template": 7}}, "chat_template must be a string, or a list"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "x"}]}}, "chat_template must be a string, or a list"),
        ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder must be an object, not list"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "'x' is not an id with a token"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"3": {"content": "<q>"}}}}, "'<q>' has id 3, which is '\\$'"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"999": {"content": "<q>"}}}}, "'<q>' should have id 999, but"),
        ({"tokenizer_config__json": {"additional_special_tokens": "x"}}, "additional_special_tokens must be a list, not str"),
        ({"added_tokens__json": {"<q>": "9"}}, "id of '<q>' must be int, not '9'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_file(tmp_path, files, complaint):
    with pytest.raises(TokenizerError, match=complaint) as error:
        load(folder(tmp_path, byte_level(), **files), 3)
    assert str(tmp_path) in str(error.value)


def test_old_formats_and_huge_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(TokenizerError, match=r"vocab\.json with merges\.txt is not supported"):
        tokenizer_from_folder(folder(tmp_path / "old", vocab__json={}, merges__txt=""), ())
    path = folder(tmp_path / "big", byte_level())
    monkeypatch.setitem(hf_tokenizer.MAX_FILE_BYTES, "tokenizer.json", 100)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: \d+ bytes, at most 100 are read"):
        load(path)
    (path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="not UTF-8 at byte 0"):
        load(path)


def mutations(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    at = rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        end = rng.randrange(at, min(len(data), at + 40))
        return data[:at] + data[end:]
    return data[:at] + rng.choice([b"99999999999", b"-1", b"null", b"[]", b'"', b"\xff\xff\xff\x7f"]) + data[at:]


CONFIG = {"bos_token": BOS, "add_bos_token": True, "chat_template": "x", "added_tokens_decoder": {"5": {"content": "&"}}}
FUZZED = {
    "tokenizer.json of bytes": ("tokenizer.json", lambda: byte_level(prefix=True).to_str().encode()),
    "tokenizer.json of pieces": ("tokenizer.json", lambda: spm_style().to_str().encode()),
    "tokenizer_config.json": ("tokenizer_config.json", lambda: json.dumps(CONFIG).encode()),
    "tokenizer.model of bpe": ("tokenizer.model", (DATA / "spm_bpe.model").read_bytes),
    "tokenizer.model of unigram": ("tokenizer.model", (DATA / "spm_unigram.model").read_bytes),
}


@pytest.mark.parametrize("name", FUZZED)
def test_broken_files_give_a_tokenizer_or_one_clear_error(tmp_path, name):
    file_name, make = FUZZED[name]
    data, rng = make(), random.Random(0)
    folder(tmp_path, byte_level() if file_name == "tokenizer_config.json" else None)
    tracemalloc.start()
    start = time.thread_time()
    num_refused = 0
    for _ in range(60):
        (tmp_path / file_name).write_bytes(mutations(data, rng))
        try:
            tokenizer = load(tmp_path, 2)
            tokenizer.decode(tokenizer.encode("ab c é\n\x00"))
        except TokenizerError:
            num_refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_refused
    assert peak < 64 * 2**20
    assert time.thread_time() - start < 20
