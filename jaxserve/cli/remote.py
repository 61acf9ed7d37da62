"""``jaxserve client``: commands that talk to a running server."""

import dataclasses
import json
import sys
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.conversation import Message, converse
from jaxserve.cli.options import Json, Lora, SamplingOptions, ServerAddress, Stats, System, flatten_options
from jaxserve.cli.terminal import StreamStats, note, print_table, write_answer

if TYPE_CHECKING:
    from jaxserve.server.client import Client
    from jaxserve.server.client_codec import Chunk

app = typer.Typer(help="Talk to a running server.")

Timeout = Annotated[float | None, typer.Option(help="Seconds for the whole call. (default: none)")]
RequestId = Annotated[str | None, typer.Option(help="The name that abort takes. (default: drawn by the server)")]


@app.command()
@flatten_options
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue.")],
    sampling: SamplingOptions,
    address: ServerAddress,
    request_id: RequestId = None,
    lora: Lora = None,
    timeout: Timeout = None,
    as_json: Json = False,
    stats: Stats = False,
) -> None:
    """Stream a continuation of a prompt."""
    with connect(address) as client:
        arguments = {"request_id": request_id, "lora": lora, "timeout_s": timeout} | sampling.set_fields()
        chunks = client.generate(prompt, **arguments)
        show(chunks, as_json=as_json, stats=stats, num_choices=sampling.n or 1)


@app.command()
@flatten_options
def chat(
    sampling: SamplingOptions,
    address: ServerAddress,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One message; without it, a dialogue.")] = None,
    system: System = None,
    request_id: RequestId = None,
    lora: Lora = None,
    timeout: Timeout = None,
    as_json: Json = False,
    stats: Stats = False,
) -> None:
    """Stream the answer to one message, or talk line by line."""
    with connect(address) as client:
        fields = sampling.one_answer().set_fields()
        arguments = {"request_id": request_id, "lora": lora, "timeout_s": timeout} | fields
        if prompt is None:
            converse(partial(answer, client, arguments), system=system, stats=stats)
            return
        opening = [{"role": "system", "content": system}] if system else []
        messages = [*opening, {"role": "user", "content": prompt}]
        show(client.generate(messages=messages, **arguments), as_json=as_json, stats=stats)


@app.command()
@flatten_options
def abort(
    request_id: Annotated[str, typer.Argument(help="Of a queued or running request.")], address: ServerAddress
) -> None:
    """End a request; its stream ends with finish reason abort."""
    with connect(address) as client:
        client.abort(request_id)


@app.command()
@flatten_options
def health(
    address: ServerAddress,
    wait: Annotated[float | None, typer.Option(help="Seconds to wait until it serves. (default: do not)")] = None,
) -> None:
    """Print the server's state; exit status 0 where it is READY."""
    from jaxserve.server.v1 import inference_pb2

    with connect(address) as client:
        if wait is not None:
            client.wait_ready(wait)
        state = inference_pb2.ServerState.Name(client.server_info().state).removeprefix("SERVER_STATE_")
    write_answer(state + "\n")
    if state != "READY":
        raise typer.Exit(1)


@app.command()
@flatten_options
def info(address: ServerAddress, as_json: Json = False) -> None:
    """The model that is served, and the server's limits and load."""
    from google.protobuf.json_format import MessageToDict

    with connect(address) as client:
        model, state = (
            MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            for message in (client.model_info(), client.server_info())
        )
    if as_json:
        write_answer(json.dumps({"model": model, "server": state}) + "\n")
    else:
        load = state.pop("load", {})
        print_table(model | state | load)


@app.command()
@flatten_options
def tokenize(
    text: Annotated[str, typer.Argument(help="What to encode.")],
    address: ServerAddress,
    chat: Annotated[bool, typer.Option("--chat", help="The text is a message: use the chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Print the token ids of a text, as generate would read it."""
    with connect(address) as client:
        messages = [{"role": "user", "content": text}]
        ids = client.tokenize(messages=messages) if chat else client.tokenize(text)
    write_answer(json.dumps(ids) + "\n" if as_json else " ".join(map(str, ids)) + "\n")


def connect(address: ServerAddress) -> "Client":
    """A client of the server; grpc is imported only now. OSError for a file that cannot be read."""
    from jaxserve.server.channels import TLS
    from jaxserve.server.client import Client

    key = address.api_key_file
    files = (address.tls_ca, address.tls_cert, address.tls_key)
    tls = None
    if address.tls or any(files):
        tls = TLS(ca=address.tls_ca, cert=address.tls_cert, key=address.tls_key)
    return Client(address.server, api_key=None if key is None else key.read_text(encoding="ascii").strip(), tls=tls)


def show(chunks: "Iterator[Chunk]", *, as_json: bool, stats: bool, num_choices: int = 1) -> None:
    """Writes a stream's text as it comes; or at its end, as JSON or where there are several choices, each by itself.

    Raises RuntimeError at the end of what was aborted: that is no whole answer.
    """
    watch = StreamStats()
    live = num_choices == 1 and not as_json
    choices: dict[int, list[Chunk]] = {}
    aborted: Chunk | None = None
    try:
        for chunk in chunks:
            watch.add(len(chunk.token_ids))
            watch.prompt_tokens = chunk.usage and chunk.usage.prompt_tokens
            if chunk.finish_reason == "abort":
                aborted = chunk
            if live:
                write_answer(chunk.text)
            else:
                choices.setdefault(chunk.choice, []).append(chunk)
    except Exception:
        if live and watch.num_tokens and sys.stdout.isatty():
            write_answer("\n")  # the error is a line of its own
        raise
    if live:
        write_answer("\n")
    for number, (_, of_choice) in enumerate(sorted(choices.items())):
        if as_json:
            write_answer(json.dumps(_whole(of_choice), ensure_ascii=False) + "\n")
        else:
            write_answer(("\n" if number else "") + "".join(chunk.text for chunk in of_choice) + "\n")
    if stats:
        note(watch.line())
    if aborted is not None:
        raise RuntimeError("the request was aborted" + (f": {aborted.stop_reason}" if aborted.stop_reason else ""))


def _whole(chunks: "list[Chunk]") -> dict[str, Any]:
    """One choice's chunks as one mapping."""
    logprobs = [dataclasses.asdict(entry) for chunk in chunks for entry in chunk.logprobs]
    values = dataclasses.asdict(chunks[-1]) | {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [i for chunk in chunks for i in chunk.token_ids],
        "logprobs": logprobs or None,
    }
    del values["index"]  # of the last chunk
    if values["usage"] is not None:
        del values["usage"]["admitted_at"]  # by the server's own clock, which no wire carries
    return values


def answer(client: "Client", arguments: dict[str, Any], messages: list[Message], watch: StreamStats) -> Generator[str]:
    """The pieces of the server's reply. A refusal of the message is a ValueError, as it is where no wire is between."""
    import grpc

    chunks = client.generate(messages=messages, **arguments)
    try:
        for chunk in chunks:
            watch.add(len(chunk.token_ids))
            watch.prompt_tokens = chunk.usage and chunk.usage.prompt_tokens
            yield chunk.text
    except grpc.RpcError as error:
        if isinstance(error, grpc.Call) and error.code() in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
        ):
            raise ValueError(error.details()) from error
        raise
    finally:
        chunks.close()
