"""A server process before the fake engine, for the tests of signals, ports and exit codes.

Prints "bound PORT" and "ready", and in the end what it set of the interpreter; errors are one line on standard error
and exit status 1.
"""

import argparse
import asyncio
import gc
import sys
import threading

from jaxserve.engine.async_engine import EngineFailedError
from jaxserve.server.app import ServeError, serve
from jaxserve.server.options import ServerOptions
from tests.server.fake_engine import FakeEngine, byte_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument("--drain-timeout", type=float, default=10.0)
    parser.add_argument("--load", choices=("well", "forever", "badly"), default="well")
    parser.add_argument("--http-port", type=int)
    parser.add_argument("--fail-at-step", type=int)
    parser.add_argument("--hang-at-step", type=int)
    parser.add_argument("--step-timeout", type=float, default=0.0)
    parser.add_argument("--otlp-traces-endpoint")
    args = parser.parse_args()

    class Engine(FakeEngine):
        def step(self):
            if args.fail_at_step is not None and self.num_steps >= args.fail_at_step:
                self.fail.set()
            if args.hang_at_step is not None and self.num_steps >= args.hang_at_step:
                threading.Event().wait()
            return super().step()

    def build():
        if args.load == "forever":
            threading.Event().wait()
        if args.load == "badly":
            raise ValueError("no such model")
        return Engine(tokenizer=byte_tokenizer(), max_model_len=10**6, step_delay_s=0.001)

    options = ServerOptions(
        port=args.port,
        http_port=args.http_port,
        metrics_port=args.metrics_port,
        drain_timeout_s=args.drain_timeout,
        step_timeout_s=args.step_timeout,
        otlp_traces_endpoint=args.otlp_traces_endpoint,
    )
    try:
        asyncio.run(
            serve(
                build,
                options,
                on_bound=lambda server: print(f"bound {server.port}", flush=True),
                on_ready=lambda _: print("ready", flush=True),
            )
        )
    except (ServeError, EngineFailedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"switch interval {sys.getswitchinterval():g} s")
    print(f"collected: {'everything' if gc.get_freeze_count() == 0 else 'what is new'}")


if __name__ == "__main__":
    main()
