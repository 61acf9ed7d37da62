"""The keywords that every way to make an engine has."""

import inspect

import pytest

from jaxserve.checkpoint.resolve import DEFAULT_MODEL
from jaxserve.engine.construction import build_parts
from jaxserve.engine.engine import Engine
from jaxserve.engine.options import EngineOptions
from tests import tiny


def test_those_are_what_builds_an_engine():
    taken = inspect.signature(build_parts).parameters
    others = {"model_config", "params", "tokenizer", "base_names"}
    assert {name: taken[name].annotation for name in taken.keys() - others} == EngineOptions.__annotations__


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_num_seq": 1}, "'max_num_seq'; did you mean 'max_num_seqs'?"), ({"speculative": 1}, "'speculative'$")],
)
def test_another_is_refused_by_name(options: dict[str, int], words: str):
    with pytest.raises(TypeError, match="no option " + words.replace("?", r"\?")):
        Engine.from_pretrained(DEFAULT_MODEL, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="no option " + words.replace("?", r"\?")):
        Engine.from_params(tiny.CONFIG, tiny.params(), **options)  # pyright: ignore[reportArgumentType]
