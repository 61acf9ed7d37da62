"""The ``jaxserve`` command: its subcommands and the one place where errors become a line and an exit status."""

import faulthandler
import os
import signal
import sys
import traceback
from typing import Annotated

import typer

import jaxserve
from jaxserve.cli import converting, evaluating, launching, local, measuring, remote, serving
from jaxserve.cli.loading import INTERRUPTED

BAD_INPUT, FAILURE = 2, 1

app = typer.Typer(
    name="jaxserve",
    help="LLM inference on JAX: generate here, serve over gRPC, or talk to a server.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(local.generate)
app.command()(local.chat)
app.command()(serving.serve)
app.command()(launching.launch)
app.add_typer(remote.app, name="client")
app.command()(local.info)
app.command()(converting.convert)
app.add_typer(measuring.app, name="bench")
app.add_typer(evaluating.app, name="eval")


@app.callback(invoke_without_command=True)
def _top_level(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    if version:
        print(f"jaxserve {jaxserve.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The console script. Ends the process without waiting for threads: one that is inside XLA's compiler, of a server
    that was told to stop while loading, cannot be interrupted, and the commands have closed what they opened. A crash
    in compiled code says on stderr where Python was."""
    faulthandler.enable()
    status = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over: a late Ctrl-C has nothing left to stop
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit status: 0, 1 failure, 2 bad input, 130 interrupted by Ctrl-C.

    Every error is one line on stderr; ``--debug`` anywhere on the line adds the traceback.
    """
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    usage_error = typer.BadParameter.__mro__[1]  # what every error of option parsing derives from
    try:
        status = app(arguments, prog_name="jaxserve", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else FAILURE
    except BrokenPipeError:
        # The reader of a pipe left (as `head` does): nothing to report, nor to flush when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, usage_error):
            message, status = error.format_message().rstrip(".") + _hint(error), BAD_INPUT  # type: ignore[attr-defined]
        else:
            message, status = _describe(error)
        print(f"error: {message}", file=sys.stderr)
        return status


def _hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context is not None else ""


def _describe(error: Exception) -> tuple[str, int]:
    """One line and the exit status for an error of a command."""
    import grpc

    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        code = error.code()
        at_fault = code.name in ("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION")
        return f"{code.name}: {error.details()}", BAD_INPUT if at_fault else FAILURE
    text = " ".join(str(error).split())
    if isinstance(error, ValueError):  # RequestError, CheckpointError and the configs' own
        return text, BAD_INPUT
    if isinstance(error, (OSError, RuntimeError)):
        return text or type(error).__name__, FAILURE
    return f"{type(error).__name__}: {text} (--debug shows where)", FAILURE
