"""Options reach what they are named after."""

import inspect
import json
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from jaxserve.cli.app import app
from jaxserve.cli.options import FIELD_OF_OPTION, EngineOptions, SamplingOptions, flatten_options
from jaxserve.engine.construction import build_parts
from jaxserve.engine.engine import Engine
from jaxserve.sampling_params import SamplingParams
from tests.cli.conftest import ENVIRONMENT


def test_unset_options_are_not_sent():
    assert SamplingOptions().set_fields() == {}
    assert SamplingOptions().params() == SamplingParams()
    assert EngineOptions().keywords() == {}


def test_zero_is_set():
    options = SamplingOptions(temperature=0.0, top_k=0, seed=0, logprobs=0, min_tokens=0)
    assert options.set_fields() == {"temperature": 0.0, "top_k": 0, "seed": 0, "logprobs": 0, "min_tokens": 0}


def test_sampling_options_are_sampling_params():
    options = SamplingOptions(stop=["a", "b"], stop_token_id=[7], ignore_eos=True, max_tokens=3, min_p=0.1)
    assert options.params() == SamplingParams(
        stop=("a", "b"), stop_token_ids=(7,), ignore_eos=True, max_tokens=3, min_p=0.1
    )
    assert {FIELD_OF_OPTION.get(f.name, f.name) for f in fields(SamplingOptions)} < {
        f.name for f in fields(SamplingParams)
    }


def test_constraints_are_sampling_params():
    options = SamplingOptions(
        logit_bias=["42:-3.5", "7:1"], allowed_token_id=[1, 2], bad_word=["x y"], n=2, repetition_penalty=1.2
    )
    assert options.params() == SamplingParams(
        logit_bias={42: -3.5, 7: 1.0}, allowed_token_ids=(1, 2), bad_words=("x y",), n=2, repetition_penalty=1.2
    )
    for text in ("42", "x:1", "42:", "42:x", ""):
        with pytest.raises(ValueError, match=f"logit_bias: {text!r} is not"):
            SamplingOptions(logit_bias=[text]).params()


def test_engine_options_are_engine_keywords():
    options = EngineOptions(prefill_sizes="16,64", no_prefix_caching=True, page_size=8, platform="cpu")
    assert options.keywords() == {"prefill_sizes": (16, 64), "prefix_caching": False, "page_size": 8}
    names = {f.name for f in fields(EngineOptions)} - {"platform", "no_prefix_caching"} | {"prefix_caching"}
    keywords = {*inspect.signature(build_parts).parameters, *inspect.signature(Engine.from_pretrained).parameters}
    assert names <= keywords


def test_adapters_are_names_and_paths():
    options = EngineOptions(lora_modules=["sql=/adapters/sql", "b=a=b"], max_loras=3, max_lora_rank=8)
    assert options.keywords() == {
        "lora_modules": {"sql": "/adapters/sql", "b": "a=b"}, "max_loras": 3, "max_lora_rank": 8
    }  # fmt: skip
    for text in ("sql", "=x", "sql=", ""):
        with pytest.raises(ValueError, match=f"lora_modules: {text!r} is not a name and a path"):
            EngineOptions(lora_modules=[text]).keywords()
    with pytest.raises(ValueError, match="lora_modules: 'a' is there twice, of x and y"):
        EngineOptions(lora_modules=["a=x", "a=y"]).keywords()


def test_flattened_options_are_parsed():
    seen = []
    flat = typer.Typer()

    @flat.command()
    @flatten_options
    def command(model: str, sampling: SamplingOptions, engine: EngineOptions, twice: bool = False) -> None:
        seen.append((model, sampling, engine, twice))

    line = ["m", "--stop", "a", "--stop", "b", "--seed", "3", "--mesh", "tensor=2", "--twice", "--no-prefix-caching"]
    assert CliRunner().invoke(flat, line).exit_code == 0
    assert seen == [
        ("m", SamplingOptions(stop=["a", "b"], seed=3), EngineOptions(mesh="tensor=2", no_prefix_caching=True), True)
    ]


@pytest.mark.parametrize(
    "command",
    ["", "generate", "chat", "serve", "info", "eval perplexity", "client"]
    + ["bench", "bench batching", "bench engine", "bench kernels"]
    + [f"client {name}" for name in ("generate", "chat", "abort", "health", "info", "tokenize")],
)
def test_every_command_has_help(command: str):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0 and "Usage: jaxserve" in result.stdout


def test_commands_that_need_no_jax_do_not_import_it():
    code = (
        "import json, sys\n"
        "from jaxserve.cli.app import run\n"
        "loaded = {}\n"
        "for line in ('--help', 'client --help', 'info smollm2-135m-instruct', 'client info --server 127.0.0.1:1'):\n"
        "    run(line.split())\n"
        "    loaded[line] = sorted({'jax', 'numpy', 'grpc'} & set(sys.modules))\n"
        "print(json.dumps(loaded))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded["--help"] == loaded["client --help"] == []
    assert "jax" not in loaded["client info --server 127.0.0.1:1"]


def test_help_is_quick():
    """CPU time of a cold start, so that a busy machine does not fail it."""
    code = (
        "import resource, subprocess, sys\nsubprocess.run([sys.executable, '-m', 'jaxserve', '--help'], check=True)\n"
    )
    code += "used = resource.getrusage(resource.RUSAGE_CHILDREN)\nprint(used.ru_utime + used.ru_stime)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    cpu_s = float(done.stdout.splitlines()[-1])
    assert min(cpu_s, time.monotonic() - start) < 1.0
