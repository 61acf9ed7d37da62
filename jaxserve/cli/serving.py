"""The ``serve`` command."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jaxserve.cli.loading import open_engine
from jaxserve.cli.options import EngineOptions, Model, flatten_options
from jaxserve.cli.terminal import ProgressDisplay, note
from jaxserve.server.logs import set_up
from jaxserve.server.options import DEFAULT_HOST, DEFAULT_PORT, ServerOptions, ToolCallParser

LogFormat = Literal["text", "json"]

if TYPE_CHECKING:
    from jaxserve.server.app import Server


@flatten_options
def serve(
    model: Model,
    engine: EngineOptions,
    host: Annotated[str, typer.Option(help="Address to bind.")] = DEFAULT_HOST,
    grpc_port: Annotated[int, typer.Option(help="0 picks a free one.")] = DEFAULT_PORT,
    http_port: Annotated[
        int | None, typer.Option(help="OpenAI-compatible HTTP; 0 picks a free one. (default: none)")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What HTTP requests may call the model; may be repeated. (default: MODEL)")
    ] = None,
    tool_call_parser: Annotated[
        ToolCallParser, typer.Option(help="How the model writes tool calls; auto: as its chat template shows.")
    ] = "auto",
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus; 0 picks a free one. (default: none)")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of the server's certificates, for all ports.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM file: clients need a certificate of it.")] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="Bearer tokens, one a line: clients need one.")] = None,
    max_concurrent_requests: Annotated[int | None, typer.Option(help="Open requests, at most.")] = None,
    max_requests_per_client: Annotated[int | None, typer.Option(help="Open requests of one client, at most.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Output tokens of any request, at most.")] = None,
    max_message_bytes: Annotated[
        int, typer.Option(help="Larger messages and bodies are refused.")
    ] = ServerOptions.max_message_bytes,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds of any request, at most.")] = None,
    step_timeout: Annotated[
        float, typer.Option(help="Seconds of one step, after which the device counts as failed; 0: no limit.")
    ] = ServerOptions.step_timeout_s,
    log_format: Annotated[LogFormat, typer.Option(help="json: a line for every request, too.")] = "text",
    port_file: Annotated[Path | None, typer.Option(help="Written with the gRPC port once it is bound.")] = None,
    weights_from: Annotated[
        list[Path] | None, typer.Option(help="A folder that UpdateWeights may read from; may be repeated.")
    ] = None,
    loras_from: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that adapters may be loaded from while serving; may be repeated."),
    ] = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that SIGTERM leaves to running requests.")] = 30.0,
    slow_reader_timeout: Annotated[float, typer.Option(help="Seconds a reader may take nothing.")] = 30.0,
) -> None:
    """Serve a model over gRPC and HTTP. SIGTERM or Ctrl-C lets running requests finish, a second one does not."""
    from jaxserve.checkpoint.resolve import resolve_model
    from jaxserve.server.app import serve as serve_grpc

    set_up(log_format)
    names = tuple(served_model_name or (served_name(model),))
    for name in engine.keywords().get("lora_modules", ()):  # a mistake is told before anything is bound
        if name in names:
            raise ValueError(f"lora_modules: {name!r} is what HTTP requests call the model")
    with ProgressDisplay() as progress:  # of a download, if there is one
        resolve_model(model, on_progress=progress)
    options = ServerOptions(
        host=host,
        port=grpc_port,
        http_port=http_port,
        served_model_names=names,
        tool_call_parser=tool_call_parser,
        metrics_port=metrics_port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        api_keys_file=api_keys_file,
        max_concurrent_requests=max_concurrent_requests,
        max_requests_per_client=max_requests_per_client,
        max_output_tokens=max_output_tokens,
        max_message_bytes=max_message_bytes,
        request_timeout_s=request_timeout,
        step_timeout_s=step_timeout,
        weight_folders=tuple(weights_from or ()),
        lora_folders=tuple(loras_from or ()),
        drain_timeout_s=drain_timeout,
        slow_reader_timeout_s=slow_reader_timeout,
    )

    def on_bound(server: "Server") -> None:
        http = "" if http_port is None else f", http on {host}:{server.http_port}"
        metrics = "" if metrics_port is None else f", metrics on {host}:{server.metrics_port}"
        note(f"listening on {host}:{server.port}{http}{metrics}")
        if port_file is not None:
            unfinished = port_file.with_name(port_file.name + ".tmp")
            unfinished.write_text(f"{server.port}\n", encoding="ascii")
            unfinished.replace(port_file)  # who polls for the file never sees half of it

    def on_ready(server: "Server") -> None:
        note(f"ready on {host}:{server.port}")

    try:
        asyncio.run(serve_grpc(lambda: open_engine(model, engine), options, on_bound=on_bound, on_ready=on_ready))
    finally:
        if port_file is not None:
            port_file.unlink(missing_ok=True)
    note("stopped")


def served_name(model: str) -> str:
    """What HTTP requests call the model that was asked for as ``model``: that, or of a path on disk its last part."""
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model
