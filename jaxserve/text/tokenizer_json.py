"""A tokenizer as JSON and back: what a checkpoint of our own keeps of it, whatever format it came from."""

import json
from typing import Any

import tokenizers

from jaxserve.text.tokenizer import Tokenizer, TokenizerError

FORMAT_VERSION = 1
_INTEGERS: dict[str, bool] = {"eos_token_ids": True, "bos_token_id": False, "pad_token_id": False, "prefix_ids": True}
_MAPPINGS = ("chat_template", "special_tokens")
# Keywords of ``Tokenizer.from_backend``: of integers (whether it is a list of them, else one or null), and by name.


def tokenizer_to_json(tokenizer: Tokenizer) -> str:
    """The `tokenizers` library's own JSON, and the fields that it has no place for."""
    fields: dict[str, Any] = {name: getattr(tokenizer, name) for name in _INTEGERS}
    fields |= {"chat_template": tokenizer._templates, "special_tokens": tokenizer._special_tokens}
    backend = json.loads(tokenizer._backend.to_str())
    return json.dumps({"format_version": FORMAT_VERSION, **fields, "backend": backend}, ensure_ascii=False)


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer that ``tokenizer_to_json`` was given.

    Raises:
        TokenizerError: naming what is missing, malformed or of a newer version.
    """
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise TokenizerError(f"not JSON: {e}") from None
    if not isinstance(values, dict) or values.pop("format_version", None) != FORMAT_VERSION:
        raise TokenizerError(f"format_version is not {FORMAT_VERSION}, which this version of jaxserve reads")
    backend = values.pop("backend", None)
    for name in values.keys() - _INTEGERS.keys() - set(_MAPPINGS):
        raise TokenizerError(f"{name!r:.60} is not known to this version of jaxserve")
    for name, is_list in _INTEGERS.items():
        value = values.get(name)
        integers = value if is_list else [] if value is None else [value]
        if not isinstance(integers, list) or not all(type(i) is int for i in integers):
            raise TokenizerError(f"{name}={value!r:.40} is not {'a list of integers' if is_list else 'an integer'}")
    for name in _MAPPINGS:
        value = values.get(name)
        if not isinstance(value, dict):
            raise TokenizerError(f"{name}={value!r:.40} is not an object")
    if not all(type(source) is str for source in values["chat_template"].values()):
        raise TokenizerError("chat_template: a template is not a text")
    try:
        loaded = tokenizers.Tokenizer.from_str(json.dumps(backend))
    except Exception as e:  # the library raises nothing narrower
        raise TokenizerError(f"backend: {e}") from None
    return Tokenizer.from_backend(loaded, **values)
