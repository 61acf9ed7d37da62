"""Two starts of an engine from a checkpoint, each in its own process: with nothing cached, then with what that kept.

    PYTHONPATH=. python benchmarks/random_checkpoint.py FOLDER
    PYTHONPATH=. python benchmarks/start_on_device.py FOLDER --out FILE [--option max_num_seqs=256]

A start is timed from the process's first line to its first token, the imports included. The file is written after each
start, with its stages, the size of the cache, and what the engine logs of its programs.
"""

import argparse
import ast
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START = time.perf_counter()


class Kept(logging.Handler):
    """The lines of a log."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def start(folder: str, cache: str, options: dict[str, Any]) -> dict[str, Any]:
    """One start, in this process."""
    log = Kept()
    logging.getLogger("jaxserve").addHandler(log)
    logging.getLogger("jaxserve").setLevel(logging.INFO)
    from jaxserve import Engine, SamplingParams
    from jaxserve.bench.engine import StartTimes
    from jaxserve.bench.environment import environment

    times = StartTimes()
    imported_s = time.perf_counter() - START
    with Engine.from_pretrained(
        folder, skip_tokenizer_init=True, compilation_cache_dir=cache, on_progress=times, **options
    ) as engine:
        ready_s = time.perf_counter() - START
        engine.generate([[1, 2, 3, 4]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        first_token_s = time.perf_counter() - START
        stats = engine.stats()
        return environment() | {
            "options": options,
            "imported_s": round(imported_s, 2),
            "ready_s": round(ready_s, 2),
            "first_token_s": round(first_token_s, 2),
            "stages_s": {name: round(seconds, 2) for name, seconds in times.stages.items()},
            "num_pages": engine.cache_config.num_pages,
            "kv_tokens": engine.cache_config.num_pages * engine.cache_config.page_size,
            "recompilations": stats.recompilations_after_ready,
            "log": log.lines,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--option", action="append", default=[], help="of Engine.from_pretrained, as NAME=VALUE")
    parser.add_argument("--cache", help="one start, in this process, with what is kept in this folder")
    args = parser.parse_args()
    options = {name: ast.literal_eval(value) for name, value in (o.split("=", 1) for o in args.option)}
    if args.cache is not None:
        args.out.write_text(json.dumps(start(args.folder, args.cache, options)))
        return
    results = []
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("nothing cached", "kept programs"):
            one = Path(cache) / f"{kind}.json"
            asked = [args.folder, "--cache", f"{cache}/compiled", "--out", str(one)]
            asked += [part for option in args.option for part in ("--option", option)]
            subprocess.run([sys.executable, __file__, *asked], check=True)
            results.append({"start": kind} | json.loads(one.read_text()))
            command = f"python benchmarks/start_on_device.py {Path(args.folder).name} {' '.join(args.option)}".strip()
            args.out.write_text(json.dumps({"command": command, "results": results}, indent=1) + "\n")
            print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
