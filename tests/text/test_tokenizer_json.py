"""Every kind of tokenizer survives being written as JSON: ids, text, prefix, templates."""

import pytest

from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tokenizer_json import tokenizer_from_json, tokenizer_to_json
from tests.text import test_hf_tokenizer, test_sentencepiece
from tests.text.metadata import gguf_metadata

TEXTS = [
    "",
    " ",
    "Hello, world!  two  spaces ",
    "naïve Zürich 世界 👩‍👩‍👧 \n\n\t x",
    "<s> </s> <|im_end|>",
    "▁a ▁",
    "123 4567",
]
TEMPLATES = {"default": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", "tool_use": "{{ tools }}"}


def made(kind: str) -> Tokenizer:
    if kind == "gguf bpe":
        return tokenizer_from_gguf(gguf_metadata("llama-bpe"))
    if kind == "gguf spm":
        return test_sentencepiece.gguf()
    if kind == "templates":
        backend = test_hf_tokenizer.byte_level()
        return Tokenizer.from_backend(
            backend, eos_token_ids=(1,), prefix_ids=(0, 1), chat_template=TEMPLATES, special_tokens={"bos_token": "<b>"}
        )
    return test_sentencepiece.tokenizer(kind)


@pytest.mark.parametrize("kind", ["gguf bpe", "gguf spm", "templates", "bpe", "unigram"])
def test_round_trip(kind: str):
    want = made(kind)
    got = tokenizer_from_json(tokenizer_to_json(want))
    for prompt in TEXTS:
        ids = want.encode(prompt)
        assert got.encode(prompt) == ids
        assert got.decode(ids) == want.decode(ids)
        assert got.decode(ids, skip_special_tokens=False) == want.decode(ids, skip_special_tokens=False)
    names = ("vocab_size", "eos_token_ids", "bos_token_id", "pad_token_id", "prefix_ids", "chat_template")
    assert all(getattr(got, name) == getattr(want, name) for name in names)
    if want.chat_template is not None:
        messages = [{"role": "user", "content": "hi"}]
        assert got.render_chat(messages) == want.render_chat(messages)
