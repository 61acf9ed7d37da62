"""Templates that would run for ever or fill the memory end soon, with one clear error."""

import time
import tracemalloc

import pytest

from jaxserve.text import template_sandbox
from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError

GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"

TOO_LONG = {
    "loops in loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for i in range(9999) %}{% for j in range(9999) %}{% continue %}{% endfor %}{% endfor %}",
    "a fan of macros": "{% macro m(n) %}{% if n %}{% set a = m(n-1) %}{% set b = m(n-1) %}{% endif %}{% endmacro %}{{ m(60) }}",
    "text that is thrown away": "{% set x %}{% for i in range(9999) %}{% for j in range(9999) %}ab{% endfor %}{% endfor %}{% endset %}",
    "a filter of a loop": "{% for i in range(9999) if range(9999) | select('odd') | list | length == 1 %}{% endfor %}",
    "searching": "{% set l = range(9999) | list %}{% for i in range(9999) %}{% if -1 in l %}{% endif %}{% endfor %}",
}  # fmt: skip

TOO_LARGE = {
    "doubled by ~": GROW % ("'aaaa'", "ns.x ~ ns.x"),
    "doubled by +": GROW % ("'aaaa'", "ns.x + ns.x"),
    "doubled lists": GROW % ("[1]", "ns.x + ns.x"),
    "lists of lists": GROW % ("[1]", "[ns.x, ns.x]"),
    "tuples of tuples": GROW % ("1", "(ns.x, ns.x)"),
    "objects of objects": GROW % ("1", "{'a': ns.x, 'b': ns.x}"),
    "dict()": GROW % ("1", "dict(a=ns.x, b=ns.x)"),
    "namespaces": GROW % ("1", "namespace(a=ns.x, b=ns.x)"),
    "a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW % ("'aaaa'", "m(ns.x)"),
    "a block": "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "squares": GROW % ("3", "ns.x * ns.x"),
    "a cycle": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    **{
        source: "{{ " + source + " }}"
        for source in (
            "'a' * 10**10", "10**10 * 'a'", "([1] * 9999) * 9999", "(10**999) ** 999",
            "'a' | center(10**10)", "'a'.center(10**10)", "'a'.ljust(10**10)", "'a'.zfill(10**10)",
            "('a\\n' * 99999) | indent(999)", "'%999999999d' % 1", "'%.999999999f' % 1.5", "'%*d' % (10**9, 1)",
            "'%9999999d' | format(1)", "'{:>999999999}'.format(1)", "'{:>{}}'.format(1, 10**9)",
            "'{a:>999999999}'.format_map({'a': 1})", "('{:>999999999}' | attr('format'))(1)",
            "('{0}' * 9999).format('a' * 9999)", "('%(a)s' * 9999) % {'a': 'a' * 9999}",
            "('a' * 9999) | replace('a', 'b' * 9999)", "('a' * 9999).replace('', 'b' * 9999)",
            "range(9999) | join('a' * 9999)", "range(9999) | join(d='a' * 9999)", "('a' * 9999).join(['b'] * 9999)",
            "('a' * 9999999) | list", "('a,' * 999999).split(',')", "('a\\n' * 999999).splitlines()",
            "([[1]] * 9999) | sum(start=[])", "[1] | tojson(indent=10**9)", "[1] | tojson(separators=('a' * 9999, 'b'))",
            "range(9999) | map('string') | map('center', 999) | join",
            "'\\t'.expandtabs(10**9)", "'a'.translate({97: 'b' * 9999})", "(1).to_bytes(10**9, 'big')",
            "strftime_now('%999999999d')", "lipsum(n=10**6)",
        )
    },
}  # fmt: skip

OUT_OF_REACH = (
    "{% include '/etc/hostname' %}", "{% import '/etc/hostname' as x %}", "{% extends '/etc/hostname' %}",
    "{{ ().__class__.__base__.__subclasses__() }}", "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('true') }}", "{{ raise_exception.__globals__.x }}",
    "{{ ('a' | attr('__class__'))() }}", "{{ 'a'.encode() }}", "{{ messages.append(1) }}", "{{ messages[0].clear() }}",
)  # fmt: skip


def failure(source: str) -> str:
    with pytest.raises(ChatTemplateError) as error:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    return str(error.value)


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_template_that_does_not_end_is_ended(monkeypatch, name):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.05)
    start = time.thread_time()
    assert "it runs for more than 0.05 s" in failure(TOO_LONG[name])
    assert time.thread_time() - start < 1


@pytest.mark.parametrize("name", TOO_LARGE)
def test_values_are_bounded_before_they_are_made(monkeypatch, name):
    monkeypatch.setattr(template_sandbox, "MAX_VALUE_LEN", 2**18)
    tracemalloc.start()
    failure(TOO_LARGE[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_all_values_together_are_bounded(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_TOTAL_LEN", 10**6)
    source = "{% set b = 'a' * 99999 %}" + "".join(f"{{% set v{i} = b[1:] %}}" for i in range(99))
    assert "more than 1000000 characters in all" in failure(source)


@pytest.mark.parametrize("source", OUT_OF_REACH)
def test_files_modules_and_attributes_are_out_of_reach(source):
    assert failure(source).startswith("the chat template failed: ")


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "{% if a %}" * 999 + "{% endif %}" * 999, "{{ 1" + "+1" * 9999 + " }}",
     "{% for a in b %}" * 50 + "{% endfor %}" * 50, "{{ 'a' | wordwrap }}", "{{ x" * 99999],
)  # fmt: skip
def test_sources_that_cannot_be_compiled_are_one_clear_error(source):
    with pytest.raises(ChatTemplateError, match="the chat template (is not valid|has 399996 characters)"):
        ChatTemplate(source)


def test_a_long_conversation_is_far_from_the_limits():
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}{% if loop.index0 == messages | length - 1 %}!{% endif %}"
        "{% set ns.text = ns.text ~ m.role %}{{ '<' + m['role'] + '>' + m['content'] | trim }}{% endfor %}{{ ns.text }}"
    )
    messages = [{"role": "user", "content": "x" * 1000}] * 1000
    assert len(ChatTemplate(source).render(messages)) == 1000 * (6 + 1000 + 4) + 1
