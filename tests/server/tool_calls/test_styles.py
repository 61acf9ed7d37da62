"""Texts as models of each style write them, cut at every place, and texts that only look like calls."""

import json
import random

import pytest

from jaxserve.server.tool_calls import Arguments, Content, Delta, Start, detect_style, make_parser
from jaxserve.server.tool_calls.json_call import MAX_HELD_LEN
from jaxserve.server.tool_calls.styles import ListParser, NamedParser

Call = tuple[str, str, str | None]  # name, arguments, id


def amount_to(deltas: list[Delta]) -> tuple[str, list[Call]]:
    """Content and calls; asserts that the deltas are in order."""
    content, calls = "", []
    for delta in deltas:
        if isinstance(delta, Content):
            assert delta.text
            content += delta.text
        elif isinstance(delta, Start):
            assert delta.index == len(calls)
            calls.append((delta.name, "", delta.call_id))
        else:
            assert delta.index == len(calls) - 1 and delta.text
            name, arguments, call_id = calls[-1]
            calls[-1] = (name, arguments + delta.text, call_id)
    return content, calls


WEATHER = '{"location": "San Francisco, CA", "unit": "celsius"}'
NESTED = '{"a": {"b": [1, "}]", {"c": "\\"</tool_call>\\""}]}, "d": "é\\u00e9\\n"}'

RECORDED: list[tuple[str, str, str, list[Call]]] = [
    # style, text, content, calls
    (
        "hermes",  # Qwen2.5-7B-Instruct and Qwen3
        f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>',
        "",
        [("get_weather", WEATHER, None)],
    ),
    (
        "hermes",  # two calls, as Qwen writes them
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n'
        "</tool_call>",
        "",
        [("f", '{"x": 1}', None), ("g", "{}", None)],
    ),
    (
        "hermes",  # Hermes 2 Pro: arguments first, text before
        'Let me look that up.\n<tool_call>\n{"arguments": {"symbol": "TSLA"}, "name": "get_stock"}\n</tool_call>\n',
        "Let me look that up.",
        [("get_stock", '{"symbol": "TSLA"}', None)],
    ),
    (
        "hermes",  # Qwen3 with its thoughts before
        '<think>\nThe user asks.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"q": "a < b"}}\n</tool_call>',
        "<think>\nThe user asks.\n</think>",
        [("f", '{"q": "a < b"}', None)],
    ),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {NESTED}}}</tool_call>', "", [("f", NESTED, None)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}', None)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}", None)]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}", None)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}', None)]),  # not closed
    (
        "hermes",  # forgets to close the first
        '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "",
        [("f", "{}", None), ("g", "{}", None)],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1', None)]),  # cut by max_tokens
    ("hermes", 'one  <tool_call>{"name": "f"}</tool_call>  two', "one  two", [("f", "{}", None)]),
    ("hermes", "no call, 1 < 2 \n", "no call, 1 < 2 \n", []),
    ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    ("hermes", "<tool_call>nothing</tool_call> more", "<tool_call>nothing</tool_call> more", []),
    ("hermes", '<tool_call>{"name": 5}', '<tool_call>{"name": 5}', []),
    ("hermes", '<tool_call>{"na', '<tool_call>{"na', []),
    ("hermes", "ends in <tool", "ends in <tool", []),
    (
        "llama3_json",  # Llama-3.1-8B-Instruct
        f'{{"name": "get_weather", "parameters": {WEATHER}}}',
        "",
        [("get_weather", WEATHER, None)],
    ),
    (
        "llama3_json",  # with the tag that its template names
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"x": "1"}}',
        "",
        [("f", '{"x": "1"}', None)],
    ),
    (
        "llama3_json",
        '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"x": 1}', None), ("g", "{}", None)],
    ),
    ("llama3_json", '\n\n{"name": "f", "arguments": {"x": 1}}', "", [("f", '{"x": 1}', None)]),
    ("llama3_json", 'I use {"name": "f", "parameters": {}}', 'I use {"name": "f", "parameters": {}}', []),
    ("llama3_json", '{"city": "Paris"} is what you asked', '{"city": "Paris"} is what you asked', []),
    ("llama3_json", "{not json", "{not json", []),
    ("llama3_json", '{"na', '{"na', []),
    ("llama3_json", "<|python_tag|>import os", "<|python_tag|>import os", []),
    ("llama3_json", "<|py", "<|py", []),
    (
        "mistral",  # Mistral-7B-Instruct-v0.3 and Nemo
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}}}]',
        "",
        [("get_weather", WEATHER, None)],
    ),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}, {"id": "123456789", "name": "g", '
        '"arguments": {}}]',
        "",
        [("f", '{"x": 1}', None), ("g", "{}", "123456789")],
    ),
    (
        "mistral",  # Mistral Small 3.2 and later
        '[TOOL_CALLS]f[ARGS]{"x": "[]"}[TOOL_CALLS]g[CALL_ID]Abc123xyz[ARGS]{"y": {"z": 1}}',
        "",
        [("f", '{"x": "[]"}', None), ("g", '{"y": {"z": 1}}', "Abc123xyz")],
    ),
    ("mistral", '[TOOL_CALLS]f{"x": 1}', "", [("f", '{"x": 1}', None)]),
    ("mistral", 'Sure. [TOOL_CALLS][{"name": "f", "arguments": {}}]', "Sure.", [("f", "{}", None)]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": [1', "", [("f", '{"x": [1', None)]),
    ("mistral", "a [list] of [TOOL things", "a [list] of [TOOL things", []),
    ("mistral", "[TOOL_CALLS]what now", "[TOOL_CALLS]what now", []),
    ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    (
        "pythonic",  # Llama-3.2-3B-Instruct, as Meta prompts it
        "[get_weather(city='San Francisco', metric=\"celsius\"), get_time()]",
        "",
        [("get_weather", '{"city": "San Francisco", "metric": "celsius"}', None), ("get_time", "{}", None)],
    ),
    (
        "pythonic",  # every kind of value
        "[ns.f-1(a=-1, b=2.5e3, c=True, d=None, e=[1, 'x)'],"
        " f={'k': (1, {\"j\": []})}, g='it\\'s, \\\\', h=true, i = \"é\\n\" ,)]",
        "",
        [
            (
                "ns.f-1",
                '{"a": -1, "b": 2500.0, "c": true, "d": null, "e": [1, "x)"], "f": {"k": [1, {"j": []}]}, '
                '"g": "it\'s, \\\\", "h": true, "i": "é\\n"}',
                None,
            )
        ],
    ),
    ("pythonic", "\n [ f ( ) ]", "\n [ f ( ) ]", []),  # a space inside of a name
    ("pythonic", "\n [ f( ) , g( x = 1 ) ]\n", "", [("f", "{}", None), ("g", '{"x": 1}', None)]),
    ("pythonic", "[f(x=1)] and so on", "and so on", [("f", '{"x": 1}', None)]),
    ("pythonic", "[f()", "", [("f", "{}", None)]),  # not closed
    ("pythonic", "[f(x=1, y='cut by max_tok", "", [("f", '{"x": 1', None)]),
    ("pythonic", "[f(x=1), g(y=", "", [("f", '{"x": 1}', None)]),
    ("pythonic", "[f(x=1, y=z)]", "y=z)]", [("f", '{"x": 1', None)]),  # broken after it was known to be a call
    *(
        ("pythonic", text, text, [])
        for text in (
            "[1, 2, 3] is the list",
            "[note(s) here]",
            "[f(1)]",
            "[f(x=1",
            "[f(x={1, 2})]",
            "[f(x=b'a')]",
            "[f(x=1e999)]",
            "[f(x=y)]",
            "[f(x=__import__('os'))]",
            "[f(x=1]",
            "[f() is it]",
            "[]",
            "[",
            "I call [f(x=1)]",
            "f(x=1)",
            "[f(=1)]",
            "[f(a b=1)]",
            "[1f(a=1)]",
            "[f(x=)]",
            "  ",
        )
    ),
    ("pythonic", "[f(x=1, x=2)]", "x=2)]", [("f", '{"x": 1', None)]),
]


@pytest.mark.parametrize(("style", "text", "content", "calls"), RECORDED)
def test_recorded_texts_however_they_are_cut(style: str, text: str, content: str, calls: list[Call]):
    for cut in range(len(text) + 1):
        parser = make_parser(style)
        deltas = [*parser.feed(text[:cut]), *parser.feed(text[cut:]), *parser.finish()]
        assert amount_to(deltas) == (content, calls), cut
    parser = make_parser(style)
    assert amount_to([d for c in text for d in parser.feed(c)] + parser.finish()) == (content, calls)


def test_arguments_come_while_they_are_written():
    for style, before in (
        ("hermes", '<tool_call>{"name": "f", "arguments": '),
        ("llama3_json", '{"name": "f", "parameters": '),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": '),
        ("mistral", "[TOOL_CALLS]f[ARGS]"),
    ):
        parser = make_parser(style)
        deltas = [*parser.feed(before), *parser.feed('{"a": "lo')]
        assert amount_to(deltas) == ("", [("f", '{"a": "lo', None)])
        assert parser.feed('ng"') == [Arguments(0, 'ng"')]


def test_pythonic_arguments_come_one_by_one():
    parser = make_parser("pythonic")
    assert parser.feed("[f(a='x'") == []
    assert parser.feed(", b=[") == [Start(0, "f"), Arguments(0, '{"a": "x"')]
    assert parser.feed("1]") == []
    assert parser.feed(")") == [Arguments(0, ', "b": [1]}')]


def test_content_comes_while_it_is_written():
    for style in ("hermes", "mistral"):
        parser = make_parser(style)
        assert parser.feed("Hello") == [Content("Hello")]
        assert parser.feed(" ") == []
        assert parser.feed("you") == [Content(" you")]


def test_a_list_and_one_named_call():
    text = '[{"name": "f", "parameters": {"x": 1}}, {"name": "g", "parameters": {}}]'
    for cut in range(len(text) + 1):
        parser = ListParser()
        deltas = [*parser.feed(text[:cut]), *parser.feed(text[cut:]), *parser.finish()]
        assert amount_to(deltas) == ("", [("f", '{"x": 1}', None), ("g", "{}", None)])
    for cut in range(len(text)):  # by its length: neither a call without its name nor a mark of another style is text
        parser = ListParser()
        content, calls = amount_to([*parser.feed(text[:cut]), *parser.finish()])
        assert content == "" and [call[0] for call in calls] == ["f", "g"][: len(calls)]
    named = NamedParser("f")
    assert amount_to([*named.feed('{"x"'), *named.feed(": 1}"), *named.finish()]) == ("", [("f", '{"x": 1}', None)])
    assert amount_to(NamedParser("f").finish()) == ("", [("f", "", None)])


def test_arguments_are_passed_on_as_they_are():
    r = random.Random(0)

    def value(depth: int) -> object:
        kinds = [lambda: r.random(), lambda: r.choice(["", 'q"\\', "{[", "]}", "</tool_call>", "é☃"]), lambda: None]
        if depth:
            kinds += [
                lambda: [value(depth - 1) for _ in range(3)],
                lambda: {str(i): value(depth - 1) for i in range(3)},
            ]
        return r.choice(kinds)()

    for _ in range(100):
        arguments = json.dumps({"a": value(3)}, indent=r.choice([None, 1]), ensure_ascii=r.random() < 0.5)
        for style, text in (
            ("hermes", f'<tool_call>{{"name": "f", "arguments": {arguments} }}</tool_call>'),
            ("llama3_json", f'{{"name": "f", "parameters":{arguments}}}'),
            ("mistral", f'[TOOL_CALLS][{{"arguments": {arguments}, "name": "f"}}]'),
            ("mistral", f"[TOOL_CALLS]f[ARGS]{arguments}"),
        ):
            parser = make_parser(style)
            assert amount_to(parser.feed(text) + parser.finish()) == ("", [("f", arguments, None)])


def test_values_of_python_are_passed_on_as_json():
    r = random.Random(2)
    kinds = [
        lambda: r.randint(-9, 9),
        lambda: r.choice(["", "q'\"\\", "a, b)]", "[f(x=1)]", "é☃\n"]),
        lambda: True,
        lambda: None,
    ]

    def value(depth: int) -> object:
        if depth and r.random() < 0.6:
            return r.choice([lambda: [value(depth - 1) for _ in range(3)], lambda: {"k'": value(depth - 1)}])()
        return r.choice(kinds)()

    for _ in range(200):
        arguments = {name: value(3) for name in "abc"[: r.randint(0, 3)]}
        text = f"[f({', '.join(f'{k}={v!r}' for k, v in arguments.items())}), g(x=1)]"
        cut = r.randint(0, len(text))
        parser = make_parser("pythonic")
        content, calls = amount_to([*parser.feed(text[:cut]), *parser.feed(text[cut:]), *parser.finish()])
        assert (content, [name for name, _, _ in calls]) == ("", ["f", "g"])
        assert json.loads(calls[0][1]) == arguments


def test_random_text_is_never_lost_and_never_an_error():
    r = random.Random(1)
    words = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", '{"name": ', '"f"', "{", "}", "[", "]", ",", ";"]
    words += ['"arguments": ', "<|python_tag|>", "text", " ", "\\", '"', ":", "1", "f(", "x=", ")", "'", "="]
    for _ in range(3000):
        text = "".join(r.choices(words, k=r.randint(1, 12)))
        for style in ("hermes", "llama3_json", "mistral", "pythonic"):
            whole, pieces = make_parser(style), make_parser(style)
            expected = amount_to(whole.feed(text) + whole.finish())
            cut = r.randint(0, len(text))
            deltas = [*pieces.feed(text[:cut]), *pieces.feed(text[cut:]), *pieces.finish()]
            assert amount_to(deltas) == expected, (style, text, cut)
            if not expected[1]:
                assert expected[0].split() == text.split() or style == "mistral", (style, text)


def test_what_never_becomes_a_call_is_not_held_for_ever():
    parser = make_parser("hermes")
    held = parser.feed('<tool_call>{"x": "' + "a" * 2 * MAX_HELD_LEN)
    assert sum(len(d.text) for d in held if isinstance(d, Content)) > MAX_HELD_LEN
    parser = make_parser("pythonic")
    held = parser.feed("[f(x=" + "[" * 2 * MAX_HELD_LEN)
    assert sum(len(d.text) for d in held if isinstance(d, Content)) > MAX_HELD_LEN
    parser = make_parser("pythonic")
    nested = "[f(x=" + "[" * 30000 + "]" * 30000 + ")]"
    assert amount_to(parser.feed(nested) + parser.finish()) == (nested, [])


def test_detect_style():
    for template, style in (
        ('{"name": <function-name>}\n<tool_call>{{ tools }}', "hermes"),
        ("<tool_call>\n<function=example>", None),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("<|python_tag|>", "llama3_json"),
        ('{"name": function name, "parameters": dictionary}', "llama3_json"),
        ("in the format of [func_name1(params_name1=params_value1), func_name2(params)]", "pythonic"),
        ("{{ messages }}", None),
        (None, None),
    ):
        assert detect_style(template) == style
