"""A tokenizer from the files of a Hugging Face model folder.

``tokenizer.json`` says how text becomes ids; where there is none, ``tokenizer.model`` does (SentencePiece). The other
files say which tokens are special, whether a text begins with one, and how a chat is written: ``tokenizer_config.json``,
``special_tokens_map.json``, ``added_tokens.json``, ``chat_template.jinja`` and ``chat_template.json``. What they say is
taken as `transformers` takes it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from jaxserve.text.decoding import TokenizerError, state_of
from jaxserve.text.sentencepiece_model import read_sentencepiece_model
from jaxserve.text.tokenizer import Tokenizer, without_panic

MAX_FILE_BYTES = {"tokenizer.json": 2**28, "tokenizer.model": 2**27}
MAX_SMALL_FILE_BYTES = 2**24  # the other files
MAX_INSERTED_LEN = 64  # characters that a normalizer may put in place of one match

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_from_folder(path: Path, eos_token_ids: Sequence[int]) -> Tokenizer | None:
    """The tokenizer of a model folder; None where it has neither ``tokenizer.json`` nor ``tokenizer.model``.

    Args:
        eos_token_ids: what the model's configuration says ends a generation. The tokenizer's own ``eos_token`` ends one
            too.

    Raises:
        TokenizerError: naming the file and what in it is malformed or not supported.
    """
    path = Path(path)
    config = _read_json(path / "tokenizer_config.json")
    config = {**_read_json(path / "special_tokens_map.json"), **config}
    of_model: dict[str, int] = {}
    if (path / "tokenizer.json").is_file():
        backend = _read_backend(path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        _check_size(path / "tokenizer.model")
        model = read_sentencepiece_model(path / "tokenizer.model")
        backend = model.backend
        ids = {"bos_token": model.bos_token_id, "eos_token": model.eos_token_id, "pad_token": model.pad_token_id}
        of_model = {name: i for name, i in ids.items() if i is not None}
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        raise TokenizerError(
            f"{path}: vocab.json with merges.txt is not supported: save the tokenizer as tokenizer.json"
        )
    else:
        return None
    named = {name: _content(config[name], f"{path}: {name}") for name in _NAMED_TOKENS if config.get(name) is not None}
    named = {name: token for name, i in of_model.items() if (token := backend.id_to_token(i))} | named
    _add_tokens(backend, path, config, named)
    ids = {name: i for name, token in named.items() if (i := backend.token_to_id(token)) is not None}
    own_eos = [ids["eos_token"]] if "eos_token" in ids else []
    try:
        return Tokenizer.from_backend(
            backend,
            eos_token_ids=tuple(dict.fromkeys((*eos_token_ids, *own_eos))),
            bos_token_id=ids.get("bos_token"),
            pad_token_id=ids.get("pad_token"),
            prefix_ids=_prefix_ids(backend, path, config, ids, is_sentencepiece=bool(of_model)),
            chat_template=_chat_templates(path, config),
            special_tokens=named | _extra_tokens(config),
        )
    except TokenizerError as e:
        raise e if str(path) in str(e) else TokenizerError(f"{path}: {e}") from e


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    _check_size(file)
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise TokenizerError(f"{file}: not UTF-8 at byte {e.start}") from None
    try:
        backend = without_panic(lambda: tokenizers.Tokenizer.from_str(text))
        without_panic(backend.no_truncation)
        without_panic(backend.no_padding)
        for part in ("normalizer", "pre_tokenizer"):
            if (value := getattr(backend, part)) is not None:
                _check_insertions(state_of(value), part)
    except TokenizerError as e:
        raise TokenizerError(f"{file}: {e}") from e
    return backend


def _check_insertions(state: Any, name: str) -> None:
    """A replacement of a megabyte for every letter would make any prompt a bomb."""
    if isinstance(state, list):
        for part in state:
            _check_insertions(part, name)
    elif isinstance(state, dict):
        for key, value in state.items():
            if key in ("content", "prepend") and isinstance(value, str) and len(value) > MAX_INSERTED_LEN:
                raise TokenizerError(f"{name} inserts {len(value)} characters, at most {MAX_INSERTED_LEN} are allowed")
            _check_insertions(value, name)


def _add_tokens(backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Adds the tokens that only the other files have, and marks as special those that they say are."""
    known = {i: token for i, token in backend.get_added_tokens_decoder().items()}
    declared: dict[int, AddedToken] = {}
    for content, i in _read_json(path / "added_tokens.json").items():
        if type(i) is not int:
            raise TokenizerError(f"{path / 'added_tokens.json'}: id of {content!r:.80} must be int, not {i!r:.20}")
        declared[i] = AddedToken(content, special=False, normalized=False)
    field = f"{path / 'tokenizer_config.json'}: added_tokens_decoder"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{field} must be an object, not {type(decoder).__name__}")
    for key, value in decoder.items():
        if not key.isascii() or not key.isdecimal() or not isinstance(value, dict):
            raise TokenizerError(f"{field}: {key!r:.40} is not an id with a token")
        flags = {k: bool(value.get(k, False)) for k in ("lstrip", "rstrip", "single_word", "special")}
        flags["normalized"] = bool(value.get("normalized", not flags["special"]))
        declared[int(key)] = AddedToken(_content(value, f"{field}[{key}]"), **flags)
    for i, token in sorted(declared.items()):
        if i in known and known[i] == token and known[i].content == token.content:
            continue
        if (owner := backend.id_to_token(i)) not in (None, token.content):
            raise TokenizerError(f"{path}: added token {token.content!r:.80} has id {i}, which is {owner!r:.80}")
        without_panic(lambda token=token: backend.add_tokens([token]))
        if backend.token_to_id(token.content) != i:
            raise TokenizerError(
                f"{path}: added token {token.content!r:.80} should have id {i}, but gets "
                f"{backend.token_to_id(token.content)}"
            )
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for token in dict.fromkeys((*named.values(), *_extra_tokens(config).values(), *_additional(path, config))):
        if token not in special and backend.token_to_id(token) is not None:
            without_panic(lambda token=token: backend.add_special_tokens([AddedToken(token, normalized=False)]))


def _additional(path: Path, config: Mapping[str, Any]) -> list[str]:
    values = config.get("additional_special_tokens") or []
    if not isinstance(values, list):
        raise TokenizerError(f"{path}: additional_special_tokens must be a list, not {type(values).__name__}")
    return [_content(value, f"{path}: additional_special_tokens") for value in values]


def _extra_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens with names of the model's own (``image_token``), which templates may use."""
    extra = config.get("extra_special_tokens")
    if not isinstance(extra, dict):
        return {}
    return {str(k): v for k, v in extra.items() if isinstance(v, str)}


def _prefix_ids(
    backend: tokenizers.Tokenizer,
    path: Path,
    config: Mapping[str, Any],
    ids: Mapping[str, int],
    *,
    is_sentencepiece: bool,
) -> tuple[int, ...]:
    """What `transformers` puts before a text: as ``add_bos_token`` says, else as the post-processor does.

    A tokenizer that adds something after the text is refused: a model would be asked to continue what has ended.
    """
    explicit = {key: config[key] for key in ("add_bos_token", "add_eos_token") if config.get(key) is not None}
    for key, value in explicit.items():
        if type(value) is not bool:
            raise TokenizerError(f"{path}: {key} must be a bool, not {value!r:.40}")
    if is_sentencepiece:
        explicit = {"add_bos_token": True} | explicit
    if explicit.get("add_eos_token"):
        raise TokenizerError(f"{path}: add_eos_token=true ends every prompt: set it to false in tokenizer_config.json")
    if "add_bos_token" in explicit:
        if not explicit["add_bos_token"]:
            return ()
        if "bos_token" not in ids:  # as transformers: nothing to add
            return ()
        return (ids["bos_token"],)
    if backend.post_processor is None:
        return ()
    plain = without_panic(lambda: backend.encode("a", add_special_tokens=False).ids)
    whole = without_panic(lambda: backend.encode("a", add_special_tokens=True).ids)
    num_added = len(whole) - len(plain)
    if whole[num_added:] != plain:
        raise TokenizerError(f"{path}: the post-processor of tokenizer.json adds tokens after the text: not supported")
    return tuple(whole[:num_added])


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name. Files of their own go before ``tokenizer_config.json``, as in `transformers`."""
    found: dict[str, str] = {}
    if (file := path / "chat_template.jinja").is_file():
        found["default"] = _read_text(file)
    if (folder := path / "additional_chat_templates").is_dir():
        found |= {file.stem: _read_text(file) for file in sorted(folder.glob("*.jinja"))}
    if found:
        return found
    value = config.get("chat_template")
    if value is None:
        value = _read_json(path / "chat_template.json").get("chat_template")
    if value is None:
        return {}
    named = value if isinstance(value, list) else [{"name": "default", "template": value}]
    for template in named:
        if not isinstance(template, dict) or not all(isinstance(template.get(k), str) for k in ("name", "template")):
            raise TokenizerError(f"{path}: chat_template must be a string, or a list of names and templates")
        found[template["name"]] = template["template"]
    return found


def _content(value: Any, name: str) -> str:
    """The text of a token, written as a string or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{name} must be a token, not {value!r:.80}")
    return content


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as e:
        raise TokenizerError(f"{file}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: must hold an object, not {type(value).__name__}")
    return value


def _read_text(file: Path) -> str:
    _check_size(file)
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise TokenizerError(f"{file}: not UTF-8 at byte {e.start}") from None


def _check_size(file: Path) -> None:
    limit = MAX_FILE_BYTES.get(file.name, MAX_SMALL_FILE_BYTES)
    if (size := file.stat().st_size) > limit:
        raise TokenizerError(f"{file}: {size} bytes, at most {limit} are read")
