"""Chat templates: rendered as the model's authors do, sandboxed, with errors that name the message at fault."""

from typing import Any

import pytest

from jaxserve.text import chat_template
from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from tests.text.metadata import BOS, EOS, gguf_metadata

USER = {"role": "user", "content": "hi"}
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source: str, *messages: dict[str, Any], **options: Any) -> str:
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(messages or (USER,), **options)


def test_a_conversation_is_rendered_with_and_without_the_generation_prompt():
    whole = render(CHATML, USER, {"role": "assistant", "content": "é <b>"})
    turns = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\né <b><|im_end|>\n"
    assert whole == turns + "<|im_start|>assistant\n"
    assert render(CHATML, USER, {"role": "assistant", "content": "é <b>"}, add_generation_prompt=False) == turns


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}", "<s>|</s>|"),
        ("{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}", ""),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n", "x\n"),
        ("{{ {'b': '<é&>', 'a': 1} | tojson }}", '{"b": "<é&>", "a": 1}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ messages[0].content }}{{ messages[0]['role'] }}", "hiuser"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ],
)
def test_templates_see_what_transformers_gives_them(source, expected):
    assert render(source) == expected


def test_strftime_now_is_the_local_time():
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == len("2026-01-01")


def test_a_template_may_refuse_with_its_own_words():
    with pytest.raises(ChatTemplateError, match="the chat template failed: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_hostile_and_broken_templates_are_one_clear_error(source):
    with pytest.raises(ChatTemplateError, match="the chat template failed: "):
        render(source)


def test_a_rendered_chat_is_bounded(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_RENDERED_LEN", 1000)
    with pytest.raises(ChatTemplateError, match="longer than 1000 characters"):
        render("{% for i in range(99999) %}0123456789{% endfor %}")


def test_invalid_jinja_names_its_line():
    with pytest.raises(ChatTemplateError, match="not valid: line 2: "):
        ChatTemplate("x\n{% for %}")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "empty"),
        ("hi", "not str"),
        ({"role": "user", "content": "hi"}, "not dict"),
        ([USER, "hi"], r"messages\[1\] must be a mapping, not str"),
        ([USER, {"content": "hi"}], r"messages\[1\] has no 'role'"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'"),
        ([{"role": "user", "content": None}], r"messages\[0\]\['content'\] must be a string, not NoneType"),
        ([USER, USER, {"role": 1, "content": "x"}], r"messages\[2\]\['role'\] must be a string, not int"),
        ([{**USER, "tool_calls": []}], r"messages\[0\] has 'tool_calls'"),
    ],
)
def test_malformed_messages_are_named_by_index(messages, complaint):
    with pytest.raises(ChatTemplateError, match=complaint):
        ChatTemplate(CHATML).render(messages)


def test_a_model_without_a_template_says_so():
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer_from_gguf(gguf_metadata()).render_chat([USER])


@pytest.mark.parametrize(("writes_bos", "add_bos"), [(False, False), (False, True), (True, False), (True, True)])
def test_encode_chat_has_one_bos_at_most(writes_bos, add_bos):
    metadata = gguf_metadata(add_bos_token=add_bos)
    metadata["tokenizer.chat_template"] = (
        "{{ bos_token }}" if writes_bos else ""
    ) + "{{ messages[0].content + eos_token }}"
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.render_chat([USER]) == (BOS if writes_bos else "") + "hi" + EOS
    ids = tokenizer.encode_chat([USER])
    assert sum(i == tokenizer.bos_token_id for i in ids) == int(writes_bos or add_bos)
    assert ids[-1:] == list(tokenizer.eos_token_ids)


def test_a_broken_template_does_not_stop_raw_prompts():
    tokenizer = tokenizer_from_gguf({**gguf_metadata(), "tokenizer.chat_template": "{% for %}"})
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
    with pytest.raises(ChatTemplateError, match="not valid"):
        tokenizer.render_chat([USER])
