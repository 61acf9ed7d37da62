"""Chat templates: rendered as the model's authors do, sandboxed, with errors that name the message at fault."""

import json
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


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def call_of(arguments: Any, content: str | None = None) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"id": "1", "function": function}]}


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("{{ tools | tojson }}", {"tools": [TOOL]}, json.dumps([TOOL])),
        ("{{ tools is none }}", {"tools": []}, "True"),
        ("{{ documents[0].text }}", {"documents": [{"text": "d"}]}, "d"),
        ("{{ enable_thinking is defined and not enable_thinking }}", {"variables": {"enable_thinking": False}}, "True"),
        ("{{ enable_thinking is defined }}", {}, "False"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", {}, "hi!"),
        ("{{ '%s-%02d' % ('a', 7) }}{{ '{:>3}'.format(5) }}{{ 'a,b'.split(',')[-1] }}", {}, "a-07  5b"),
        ("{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m(1) %}2{% endcall %}", {}, "<12>"),
        ("{% for m in messages %}{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %}", {}, "1True"),
        ("{{ messages | map(attribute='role') | join('|') }}{{ ['a', 'b'] | join(d='-') }}", {}, "usera-b"),
        ("{% set x = {'k': [1, 2][::-1]} %}{% for k, v in x.items() %}{{ k }}{{ v }}{% endfor %}", {}, "k[2, 1]"),
        ("{{ 'a\nb' | indent(2) }}{{ ('x' * 3) ~ 1 ~ none }}", {}, "a\n  bxxx1None"),
    ],
)
def test_what_templates_use_works(source, options, expected):
    assert render(source, **options) == expected


def test_arguments_of_tool_calls_take_the_form_that_the_template_can_use():
    wants_object = "{{ messages[0].tool_calls[0].function.arguments.city }}"
    wants_string = "{{ '>' + messages[0].tool_calls[0].function.arguments }}"
    for arguments in ({"city": "é"}, '{"city": "é"}'):
        assert render(wants_object, call_of(arguments)) == "é"
        assert render(wants_string, call_of(arguments)) == '>{"city": "é"}'
    assert render(wants_string, call_of("not json")) == ">not json"


def test_no_content_beside_tool_calls_is_none_or_an_empty_text():
    assert render("{{ messages[0].content is none }}", call_of({})) == "True"
    assert render("{{ '>' + messages[0].content }}", call_of({})) == ">"
    without = {k: v for k, v in call_of({}).items() if k != "content"}
    assert render("{{ messages[0].content is defined }}", without) == "False"


def test_parts_of_text_are_joined_for_templates_that_know_only_strings():
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert render("{{ messages[0].content }}", message) == "a\nb"
    in_loop = "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert render(in_loop, message) == "[a][b]"


def test_other_fields_of_a_message_reach_the_template():
    message = {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f", "reasoning_content": "r"}
    source = "{{ messages[0].tool_call_id }}{{ messages[0].name }}{{ messages[0].reasoning_content }}"
    assert render(source, message) == "1fr"


def test_the_caller_s_messages_are_out_of_reach():
    message = {"role": "user", "content": "hi", "extra": {"a": [1]}}
    render("{% set ns = namespace(m=messages) %}{% set ns.m = [] %}{{ ns.m }}", message)
    assert message == {"role": "user", "content": "hi", "extra": {"a": [1]}}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tools": "x"}, "tools must be a list of objects, not str"),
        ({"tools": [1]}, r"tools\[0\] must be an object, not int"),
        ({"documents": [None]}, r"documents\[0\] must be an object, not NoneType"),
        ({"variables": {"messages": []}}, "variable 'messages' cannot be set"),
        ({"variables": {"f": print}}, r"variables\['f'\] must be plain data, not builtin_function"),
        ({"tools": [{"a": [[[[[[[[[[]]]]]]]]]]}]}, "nested more than 6 deep"),
    ],
)
def test_malformed_arguments_are_named(monkeypatch, options, complaint):
    monkeypatch.setattr(chat_template, "MAX_DEPTH", 6)
    with pytest.raises(ChatTemplateError, match=complaint):
        render(CHATML, **options)


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
        ([{"role": "user", "content": None, "tool_calls": []}], r"\['content'\] must be a string, not NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"\['content'\]\[0\] is 'image': only parts of type 'text'"),
        ([{"role": "user", "content": ["hi"]}], r"\['content'\]\[0\] is 'str': only parts of type 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"\['content'\]\[0\]\['text'\] must be a string"),
        ([{**USER, "x": object()}], r"messages\[0\]\['x'\] must be plain data, not object"),
        ([{**USER, "x": {1: 2}}], r"messages\[0\]\['x'\] has a key that is not a string"),
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
