"""Options that several commands share, each declared once as a field of a dataclass."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from jaxserve.sampling_params import SamplingParams, sampling_params_from
from jaxserve.server.options import DEFAULT_TARGET

Model = Annotated[
    str,
    typer.Argument(
        help="A model's folder, a .gguf file, a name (smollm2-135m-instruct comes with the quickstart), or org/name of "
        "the Hugging Face hub, as org/name@revision and org/name:file.gguf too."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]
System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]
Lora = Annotated[str | None, typer.Option(help="Name of a loaded adapter. (default: the base model)")]
Stats = Annotated[bool, typer.Option("--stats", help="Print time to first token and tokens/s on stderr.")]
Platform = Annotated[str | None, typer.Option(help="cpu, cuda or tpu. (default: the best there is)")]


FIELD_OF_OPTION = {
    "stop_token_id": "stop_token_ids",
    "allowed_token_id": "allowed_token_ids",
    "bad_word": "bad_words",
}  # options that are repeated, in the singular


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """One request's sampling. Unset (None, empty) is left to the engine's or server's default."""

    max_tokens: Annotated[int | None, typer.Option(help="Output tokens at most. (default: room in the model)")] = None
    min_tokens: Annotated[int | None, typer.Option(help="No end before this many output tokens.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. (default: 1)")] = None
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass in (0, 1].")] = None
    top_k: Annotated[int | None, typer.Option(help="Tokens kept; 0 is off.")] = None
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this fraction as likely as the best one.")] = None
    seed: Annotated[int | None, typer.Option(help="Same seed and prompt, same tokens. (default: drawn)")] = None
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may be repeated.")] = None
    stop_token_id: Annotated[list[int] | None, typer.Option(help="A token id that ends it; may be repeated.")] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="End-of-sequence does not end the text.")] = False
    logprobs: Annotated[int | None, typer.Option(help="Log-probabilities of the k best tokens (with --json).")] = None
    n: Annotated[int | None, typer.Option("--n", "-n", help="Completions of each prompt.")] = None
    presence_penalty: Annotated[float | None, typer.Option(help="Off the logits of tokens of the output.")] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="The same for each time they occur.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="1.1 makes repeating prompt or output rarer.")] = None
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID:BIAS", help="Added to a token's logit, as 42:-3.5; may be repeated.")
    ] = None
    allowed_token_id: Annotated[list[int] | None, typer.Option(help="The only ids allowed; may be repeated.")] = None
    bad_word: Annotated[list[str] | None, typer.Option(help="The text does not have it; may be repeated.")] = None
    truncate_prompt_tokens: Annotated[int | None, typer.Option(help="Read the prompt's last tokens only.")] = None

    def set_fields(self) -> dict[str, Any]:
        """The fields that were set, under the names of ``SamplingParams``."""
        # By identity: 0 is a temperature, and equal to False.
        values = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        for option, name in FIELD_OF_OPTION.items():
            if option in values:
                values[name] = values.pop(option)
        if "logit_bias" in values:
            values["logit_bias"] = parse_logit_bias(values["logit_bias"])
        return values

    def one_answer(self) -> "SamplingOptions":
        """Itself. ValueError where it asks for several answers."""
        if self.n is not None and self.n != 1:
            raise ValueError(f"n: {self.n} answers, a conversation takes 1")
        return self

    def params(self) -> SamplingParams:
        return sampling_params_from(self.set_fields())


def parse_logit_bias(texts: list[str]) -> dict[int, float]:
    """``["42:-3.5"]`` as ids and numbers. ValueError naming the option."""
    found: dict[int, float] = {}
    for text in texts:
        token, _, bias = text.partition(":")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise ValueError(f'logit_bias: {text!r} is not a token id and a number as "42:-3.5"') from None
    return found


def parse_sizes(name: str, text: str) -> tuple[int, ...]:
    """``"64,256"`` as numbers. ValueError naming the option."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise ValueError(f'{name}: {text!r} is not a list of sizes as "64,256"') from None


def parse_lora_modules(texts: list[str]) -> dict[str, str]:
    """``["sql=/adapters/sql"]`` as names and paths. ValueError naming the option."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f'lora_modules: {text!r} is not a name and a path as "sql=/adapters/sql"')
        if name in found:
            raise ValueError(f"lora_modules: {name!r} is there twice, of {found[name]} and {path}")
        found[name] = path
    return found


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to build an engine: the keywords of ``Engine.from_pretrained``. Unset is left to the engine's default."""

    mesh: Annotated[
        str | None, typer.Option(help='Devices, as "stage=1,tensor=2" or "replica=2,tensor=2". (default: one device)')
    ] = None
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.")] = None
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and output together, at most.")] = None
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences that run at once, at most.")] = None
    num_pages: Annotated[int | None, typer.Option(help="Pages of the KV cache (or give --memory-fraction).")] = None
    memory_fraction: Annotated[
        float | None,
        typer.Option(
            help="CPU: share of the machine's memory for the KV cache alone. "
            "Accelerators: of each device's memory, for weights, cache and workspace together."
        ),
    ] = None
    page_size: Annotated[int | None, typer.Option(help="Tokens in a page.")] = None
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="auto; int8 or fp8: about twice the tokens of bfloat16 (of GPUs only Hopper).")
    ] = None
    prefill_sizes: Annotated[str | None, typer.Option(help='Tokens in a step that reads prompts, as "64,256".')] = None
    decode_sizes: Annotated[
        str | None, typer.Option(help='Sequences that decode in a step, as "1,8"; the last is --max-num-seqs.')
    ] = None
    max_num_waiting: Annotated[int | None, typer.Option(help="Requests queued, at most.")] = None
    max_loras: Annotated[
        int | None, typer.Option(help="LoRA adapters loaded at once, at most. (default: those of --lora-modules)")
    ] = None
    max_lora_rank: Annotated[int | None, typer.Option(help="Their rank, at most. (default: 16)")] = None
    lora_modules: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter to load at start; may be repeated.")
    ] = None
    no_prefix_caching: Annotated[bool, typer.Option("--no-prefix-caching", help="Share no prefixes.")] = False
    generation_config: Annotated[
        str | None, typer.Option(help="auto: sampling as the checkpoint recommends where unset; none: not so.")
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(help="auto: as stored, GGUF dequantized; none: dequantized; gguf, gptq, awq, ...: as stored."),
    ] = None
    compilation_cache_dir: Annotated[Path | None, typer.Option(help="Keep compiled steps here between starts.")] = None
    platform: Platform = None

    def keywords(self) -> dict[str, Any]:
        """The engine keywords that were set."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        values.pop("platform", None)
        if values.pop("no_prefix_caching"):
            values["prefix_caching"] = False
        for name in ("prefill_sizes", "decode_sizes"):
            if name in values:
                values[name] = parse_sizes(name, values[name])
        if "lora_modules" in values:
            values["lora_modules"] = parse_lora_modules(values["lora_modules"])
        return values


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """Which server a client command talks to, and what it shows there."""

    server: Annotated[str, typer.Option(help="HOST:PORT of a running server.")] = DEFAULT_TARGET
    api_key_file: Annotated[Path | None, typer.Option(help="A file with the server's bearer token.")] = None
    tls: Annotated[bool, typer.Option("--tls", help="Connect with TLS; implied by the three files.")] = False
    tls_ca: Annotated[Path | None, typer.Option(help="PEM file: who has signed the server's certificate.")] = None
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of the client's own certificate.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None


def flatten_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer can read it: each parameter annotated with one of the dataclasses here becomes that class's
    fields, as options. Typer itself knows no groups of options."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    parameters = [
        p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(command).parameters.values()
        if p.name not in groups
    ]
    for group in groups.values():
        field_hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=field_hints[f.name])
            for f in fields(group)
        ]

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        command(**values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    return flat
