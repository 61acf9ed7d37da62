"""A Jinja sandbox that ends: a template has a limit of time, of the size of any value, and of all it makes together.

Jinja's own sandbox keeps a template from attributes, modules and files, but not from ``range`` in ``range``, from
doubling a string in a loop, or from a format that is a gigabyte wide. Here every way to make a value passes a check.
Loops, concatenations, displays, slices and literal text are sent through filters in the syntax tree (naming those
gains a template nothing); calls and operators pass the hooks that Jinja has; of filters and methods only those of a
table may be used, those that can grow a value with a bound computed before they run. What runs between two checks is
one operation of the interpreter on values of bounded size.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 2.0  # of the thread's processor time: a busy machine must not fail a good template
MAX_VALUE_LEN = 2**24  # characters of one value; a node of a list or dictionary counts as NODE_LEN
MAX_TOTAL_LEN = 2**28  # of all values that one rendering makes
MAX_SOURCE_LEN = 2**17  # characters of a template; the longest in use have a fifth of it
MAX_WIDTH = 1000  # of padding, indentation and formats
NODE_LEN = 64

_CHUNK = 8  # iterations between two looks at the clock
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class ExhaustedError(Exception):
    """The template went over one of the limits."""


class Budget:
    """What one rendering may still use."""

    def __init__(self):
        self._deadline = time.thread_time() + MAX_SECONDS
        self._left = MAX_TOTAL_LEN

    def check(self) -> None:
        if time.thread_time() > self._deadline:
            raise ExhaustedError(f"it runs for more than {MAX_SECONDS:g} s")

    def charge(self, value: Any) -> Any:
        """Takes the value's size from what is left, and gives the value back."""
        self.check()
        self._left -= size_of(value)
        if self._left < 0:
            raise ExhaustedError(f"it makes more than {MAX_TOTAL_LEN} characters in all")
        return value


def size_of(value: Any) -> int:
    """Characters and nodes of a value, parts that occur twice counted twice, as writing it out would.

    Raises:
        ExhaustedError: more than ``MAX_VALUE_LEN``.
    """
    size, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        size += len(part) if isinstance(part, (str, bytes)) else NODE_LEN
        if isinstance(part, Namespace):
            part = object.__getattribute__(part, "_Namespace__attrs")
        if isinstance(part, Mapping):
            waiting.extend(part.keys())
            waiting.extend(part.values())
        elif isinstance(part, (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))):
            waiting.extend(part)
        if size + NODE_LEN * (len(waiting) - 1) > MAX_VALUE_LEN:
            raise ExhaustedError(f"it makes a value of more than {MAX_VALUE_LEN} characters")
    return size


def _bound(size: int) -> None:
    if size > MAX_VALUE_LEN:
        raise ExhaustedError(f"it makes a value of more than {MAX_VALUE_LEN} characters")


# Guards: called with the arguments of a method or filter before it runs, refusing what would grow too far. One that has
# to go through an iterator gives arguments to use instead.


def _width(text: Any, width: Any = 0, *_: Any, **__: Any) -> None:
    if not isinstance(width, int) or abs(width) > MAX_WIDTH:
        raise ExhaustedError(f"a width of {width!r:.20}, at most {MAX_WIDTH} is allowed")


def _indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    length = len(width) if isinstance(width, str) else width
    _width(text, length)
    num_lines = 1 + sum(str(text).count(c) for c in _LINE_ENDS)
    _bound(num_lines * (length + NODE_LEN))


def _replace(*args: Any, **_: Any) -> None:
    text, old, new = (str(a) for a in (args[-4:] if len(args) > 3 else args)[:3])
    num_matches = text.count(old)
    _bound(len(text) + num_matches * len(new))


def _splits(text: str, separator: str | None = None, *_: Any, **__: Any) -> None:
    # At whitespace: at most every second character begins a part; counting them would make them.
    num_parts = len(text) // 2 if separator is None else text.count(separator)
    _bound((num_parts + 1) * NODE_LEN if separator is not None else num_parts)


def _split_lines(text: str, *_: Any, **__: Any) -> None:
    _bound(NODE_LEN * sum(text.count(c) for c in _LINE_ENDS))


def _percent(text: str, *args: Any, **kwargs: Any) -> None:
    if re.search(r"%[^a-zA-Z%]*(?:\*|\d{4})", re.sub(r"%\([^)]*\)", "%", text)):
        raise ExhaustedError(f"a format that is wider than {MAX_WIDTH} or takes its width from a value")
    _bound(len(text) + text.count("%") * size_of([args, kwargs]))


def _braces(text: str, *args: Any, **kwargs: Any) -> None:
    if re.search(r":[^{}]*(?:\d{4}|\{)", text):
        raise ExhaustedError(f"a format that is wider than {MAX_WIDTH} or takes its width from a value")
    _bound(len(text) + text.count("{") * size_of([args, kwargs]))


def _number(*args: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(args[3] if len(args) > 3 else start, (int, float)):
        raise ExhaustedError("a sum of something other than numbers")


def _json(value: Any, *args: Any, **kwargs: Any) -> None:
    size_of(value)
    for option in (*args, *kwargs.values()):
        for width in option if isinstance(option, (list, tuple)) else (option,):
            _width(None, len(width) if isinstance(width, str) else int(width or 0))


def _joined(separator: str, values: Iterable[Any], *_: Any, **__: Any) -> tuple[Any, ...]:
    parts = list(islice(values, MAX_VALUE_LEN // NODE_LEN + 1))  # an iterator can be gone through once only
    _bound(size_of(parts) + len(parts) * len(separator))
    return separator, parts


def _join(values: Iterable[Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return _joined(str(args[0] if args else kwargs.get("d", "")), values)[1], *args


def _all_sized(*args: Any, **kwargs: Any) -> None:
    for value in (*args, *kwargs.values()):
        size_of(value)


_Guard = Callable[..., tuple[Any, ...] | None] | None

_PLAIN_STR_METHODS = """
    upper lower strip lstrip rstrip title capitalize casefold swapcase startswith endswith find rfind index rindex count
    isalpha isdigit isalnum isspace isupper islower isnumeric isdecimal istitle isidentifier isascii isprintable
    removeprefix removesuffix partition rpartition
"""
_METHODS: Mapping[type, Mapping[str, _Guard]] = {
    str: {
        **dict.fromkeys(_PLAIN_STR_METHODS.split()),
        **dict.fromkeys(("split", "rsplit"), _splits),
        **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
        "splitlines": _split_lines,
        "replace": _replace,
        "join": _joined,
    },
    dict: dict.fromkeys(("get", "keys", "values", "items", "copy")),
    list: dict.fromkeys(("index", "count", "copy")),
    tuple: dict.fromkeys(("index", "count")),
    float: {"is_integer": None},
    int: {"is_integer": None},
}

_PLAIN_FILTERS = """
    abs attr count d default dictsort first float groupby int items last length list map max min reject rejectattr
    reverse round safe select selectattr sort unique
"""
_TEXT_FILTERS = "capitalize e escape forceescape lower string title trim truncate upper urlencode wordcount"
_FILTERS: Mapping[str, _Guard] = {
    **dict.fromkeys(_PLAIN_FILTERS.split()),
    **dict.fromkeys(_TEXT_FILTERS.split(), _all_sized),
    **dict.fromkeys(("batch", "center", "slice"), _width),
    "format": _percent,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "sum": _number,
    "tojson": _json,
}


class _Loop:
    """What a loop runs over, with a look at the clock now and then."""

    def __init__(self, values: Iterable[Any], budget: Budget):
        self._values, self._budget = values, budget

    def __iter__(self) -> Iterator[Any]:
        for i, value in enumerate(self._values):
            if i % _CHUNK == 0:
                self._budget.check()
            yield value

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]  # TypeError where there is none, as Jinja expects


class _Wrap(NodeTransformer):
    """Sends through the sandbox what Jinja compiles to plain Python."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "(loop)")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "(concat)")

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # text of the template counts each time it is written

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "(made)") if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "(made)") if node.ctx == "load" else node

    def _visit_display(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "(made)")

    visit_List = visit_Dict = _visit_display


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class GenerationBlocks(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training: here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, or of compiling. Raises ``ExhaustedError`` at a limit."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, to_json: Callable[..., str]):
        self.budget = budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, GenerationBlocks],
            optimized=False,  # constants are folded by running them, outside of any limit
            finalize=_finalize,
            cache_size=0,
        )
        self.filters["tojson"] = to_json
        self.filters = {name: self._guarded(self.filters[name], guard) for name, guard in _FILTERS.items()}
        self.filters |= {
            "(loop)": lambda values: _Loop(values, budget),
            "(concat)": self._concat,
            "(made)": budget.charge,
        }
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._callables = tuple(self.globals.values())

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Wrap().visit(super()._parse(source, name, filename))

    def _guarded(self, function: Callable[..., Any], guard: _Guard) -> Callable[..., Any]:
        has_context = hasattr(function, "jinja_pass_arg")
        budget = self.budget

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            budget.check()
            context, args = args[:has_context], args[has_context:]
            if guard is not None:
                args = guard(*args, **kwargs) or args
            return budget.charge(function(*context, *args, **kwargs))

        return guarded

    def _concat(self, values: list[Any]) -> str:
        size_of(values)
        return self.budget.charge("".join(map(str, values)))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        return _Format(value.__self__, wrapped)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.budget.check()
        if isinstance(__obj, (BuiltinMethodType, MethodType)) and not isinstance(__obj.__self__, (LoopContext, Cycler)):
            owner = __obj.__self__
            methods = next((m for kind, m in _METHODS.items() if isinstance(owner, kind)), {})
            if __obj.__name__ not in methods:
                raise SecurityError(f"{type(owner).__name__}.{__obj.__name__} is not available to templates")
            if (guard := methods[__obj.__name__]) is not None:
                args = (guard(owner, *args, **kwargs) or (owner, *args))[1:]
        elif not (
            isinstance(__obj, (Macro, BlockReference, LoopContext, Joiner, MethodType, Undefined, _Format))
            or any(__obj is known for known in __self._callables)
        ):
            raise SecurityError(f"{type(__obj).__name__} is not callable by templates")
        return __self.budget.charge(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            num_bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if num_bits > 4096:
                raise ExhaustedError("a number of more than 4096 bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    _bound(size_of(value) * times)
        elif operator == "+" and not isinstance(left, (int, float)):
            _bound(size_of(left) + size_of(right))
        elif operator == "%" and isinstance(left, str):
            _percent(left, right)
        return self.budget.charge(super().call_binop(context, operator, left, right))


class _Format:
    """``str.format`` of a string, as the sandbox wraps it."""

    def __init__(self, text: str, function: Callable[..., str]):
        self._text, self._function = text, function

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        _braces(self._text, *args, **kwargs)
        return self._function(*args, **kwargs)


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> str:
    """All that a template writes passes here, also inside of macros and blocks that are not written in the end."""
    if not isinstance(value, str):
        size_of(value)
        value = str(value)
    return context.environment.budget.charge(value)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    if len(form) > MAX_WIDTH or not re.fullmatch(r"(?:[^%]|%[-_^#]?[A-Za-z%])*", form):
        raise jinja2.TemplateError(f"strftime_now({form!r:.80}) is not a format of plain directives")
    return datetime.now().strftime(form)
