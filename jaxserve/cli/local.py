"""Commands that run in this process: generate, chat, info."""

import dataclasses
import json
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.cli.conversation import Message, converse
from jaxserve.cli.loading import open_engine
from jaxserve.cli.options import EngineOptions, Json, Lora, Model, SamplingOptions, Stats, System, flatten_options
from jaxserve.cli.terminal import StreamStats, note, print_table, write_answer
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

Prompts = Annotated[list[str], typer.Option("--prompt", "-p", help="What to continue or answer; may be repeated.")]
Chat = Annotated[bool, typer.Option("--chat", help="Each prompt is a message: use the model's chat template.")]


@flatten_options
def generate(
    model: Model,
    prompt: Prompts,
    sampling: SamplingOptions,
    engine: EngineOptions,
    lora: Lora = None,
    chat: Chat = False,
    as_json: Json = False,
    stats: Stats = False,
) -> None:
    """Answer prompts on this machine: one is streamed, several are batched. --json prints a line for each."""
    sampling.params()  # what is wrong in itself is told before anything is loaded
    check_lora(lora, engine)
    with open_engine(model, engine) as e:
        params = e.default_sampling_params(**sampling.set_fields())
        inputs = [chat_prompt(e, [{"role": "user", "content": p}]) for p in prompt] if chat else prompt
        if len(inputs) == params.n == 1 and not as_json:
            watch = StreamStats()
            for text in stream_text(e, inputs[0], params, lora, watch):
                write_answer(text)
            write_answer("\n")
            if stats:
                note(watch.line())
            return
        start = time.perf_counter()
        completions = e.generate(inputs, params, lora=lora)
        seconds = time.perf_counter() - start
        texts = [text for text in prompt for _ in range(params.n)]
        for number, (text, completion) in enumerate(zip(texts, completions, strict=True)):
            if as_json:
                values = {"prompt": text} | dataclasses.asdict(completion)
                write_answer(json.dumps(values, ensure_ascii=False) + "\n")
            else:
                write_answer(("\n" if number else "") + completion.text + "\n")
        if stats:
            num_tokens = sum(len(c.token_ids) for c in completions)
            note(f"{num_tokens} tokens in {seconds:.3f} s, {num_tokens / seconds:.1f} tokens/s")


@flatten_options
def chat(
    model: Model,
    sampling: SamplingOptions,
    engine: EngineOptions,
    lora: Lora = None,
    system: System = None,
    stats: Stats = False,
) -> None:
    """Talk to a model on this machine, line by line. /exit leaves, Ctrl-C stops an answer."""
    sampling.one_answer().params()
    check_lora(lora, engine)
    with open_engine(model, engine) as e:
        params = e.default_sampling_params(**sampling.set_fields())

        def answer(messages: list[Message], watch: StreamStats) -> Generator[str]:
            return stream_text(e, chat_prompt(e, messages), params, lora, watch)

        converse(answer, system=system, stats=stats)


def info(
    model: Model,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence, for its KV cache. (default: longest)")] = None,
    batch: Annotated[int, typer.Option(help="Such sequences.")] = 1,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, and what its KV cache takes. Reads metadata only; a bare config.json will do."""
    from jaxserve.checkpoint.info import checkpoint_info
    from jaxserve.checkpoint.open import open_checkpoint

    with open_checkpoint(model, allow_bare=True) as checkpoint:
        facts = checkpoint_info(checkpoint, context_len=context, batch=batch)
        values = dataclasses.asdict(facts) | dataclasses.asdict(checkpoint.config)
    if as_json:
        write_answer(json.dumps(values) + "\n")
    else:
        if (quantization := checkpoint.config.quantization) is not None:  # in short: it names every matrix
            values["quantization"] = str(quantization)
        print_table(values)


def check_lora(lora: str | None, engine: EngineOptions) -> None:
    """ValueError where no adapter of that name will be loaded."""
    loaded = engine.keywords().get("lora_modules", {})
    if lora is not None and lora not in loaded:
        raise ValueError(f"lora: {lora!r} is none of --lora-modules: {', '.join(loaded) or 'there are none'}")


def chat_prompt(engine: "Engine", messages: list[Message]) -> list[int]:
    """Token ids of a conversation, ready for its answer."""
    if engine.tokenizer is None:
        raise ValueError(f"model {engine.model_name} has no tokenizer, so no chat template")
    return engine.tokenizer.encode_chat(messages)


def stream_text(
    engine: "Engine", prompt: str | list[int], params: SamplingParams, lora: str | None, watch: StreamStats
) -> Generator[str]:
    """The pieces of one answer as they come, its tokens counted by ``watch``."""
    for event in engine.stream(prompt, params, lora=lora):
        watch.add(event.token_id is not None)
        if event.usage is not None:
            watch.prompt_tokens = event.usage.prompt_tokens
        if event.text:
            yield event.text
