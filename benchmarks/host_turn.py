"""The host's turn of a decode step (schedule, build, commit), without a device: a runner that answers at once.

    python benchmarks/host_turn.py [--rows 1 64 256 512] [--text] [--out FILE]

Medians in ms a step, steps in which a page becomes full included. What a device's step hides of it is another matter;
with `--text` tokens become text, by the packaged model's tokenizer.
"""

import argparse
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxserve.bench.environment import environment
from jaxserve.checkpoint.resolve import DEFAULT_MODEL
from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.engine.loading import opened_model
from jaxserve.engine.loop import StepLoop
from jaxserve.engine.step_times import StepTimes
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.step_io import Bucket, StepDims, StepOutputs
from jaxserve.text.tokenizer import Tokenizer

PARTS = ("schedule_s", "build_s", "commit_s")
PROMPT_LEN, NUM_STEPS, PAGE_SIZE, MAX_MODEL_LEN, VOCAB_SIZE = 100, 400, 16, 2048, 49152


class InstantRunner:
    """Says random tokens."""

    def __init__(self, dims: StepDims):
        self.dims, self.config = dims, SimpleNamespace(vocab_size=VOCAB_SIZE)
        self._random = np.random.default_rng(0)

    def forward(self, bucket: Bucket, buffers: np.ndarray, *, has_adapters: bool) -> int:
        return bucket.num_rows

    def sample(self, num_rows: int, asked: str, allowed: None) -> int:
        return num_rows

    def read(self, num_rows: int) -> StepOutputs:
        return random_outputs(self._random, num_rows)


def random_outputs(r: np.random.Generator, num_rows: int) -> StepOutputs:
    nothing, tokens = np.zeros((num_rows, 0)), r.integers(1000, 40_000, num_rows, dtype=np.int32)
    return StepOutputs(tokens, np.zeros(num_rows, np.float32), nothing, nothing)


def run(num_rows: int, tokenizer: Tokenizer | None) -> list[StepTimes]:
    """The steps that decode ``num_rows`` rows."""
    scheduler_config = SchedulerConfig(
        max_model_len=MAX_MODEL_LEN, max_num_seqs=num_rows, prefill_sizes=(2048,), decode_sizes=(num_rows,)
    )
    cache = CacheConfig(num_pages=num_rows * MAX_MODEL_LEN // PAGE_SIZE, page_size=PAGE_SIZE)
    dims = StepDims(
        num_slots=num_rows,
        max_pages_per_seq=MAX_MODEL_LEN // PAGE_SIZE,
        num_pages=cache.num_pages,
        page_size=PAGE_SIZE,
    )
    runner: Any = InstantRunner(dims)
    loop = StepLoop(Scheduler(cache, scheduler_config, dims), runner, tokenizer)
    prompts = np.random.default_rng(1).integers(0, VOCAB_SIZE, (num_rows, PROMPT_LEN)).tolist()
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS + num_rows, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        request = Request(
            request_id=str(i),
            prompt_token_ids=tuple(prompt),
            params=params,
            max_total_len=PROMPT_LEN + NUM_STEPS + num_rows,
            stop_token_ids=(),
            seed=0,
        )
        loop.add(request)
    found = []
    while len(found) < NUM_STEPS:
        step = loop.advance(None)
        try:
            while True:
                step.send(None)
        except StopIteration as end:
            times: StepTimes = end.value
        loop.take_events()
        if times.batch is not None and times.batch.bucket.decode_rows and not times.batch.bucket.prefill_tokens:
            found.append(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256, 512])
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = None
    if args.text:
        with opened_model(DEFAULT_MODEL) as model:
            tokenizer = model.tokenizer
    rows = []
    for num_rows in args.rows:
        steps = run(num_rows, tokenizer)
        parts = {name.replace("_s", "_ms"): 1e3 * statistics.median(getattr(s, name) for s in steps) for name in PARTS}
        parts["host_ms"] = 1e3 * statistics.median(sum(getattr(s, name) for name in PARTS) for s in steps)
        rows.append({"rows": num_rows} | {name: round(ms, 3) for name, ms in parts.items()})
        print(rows[-1], flush=True)
    if args.out is not None:
        command = f"python benchmarks/host_turn.py --rows {' '.join(map(str, args.rows))}{' --text' * args.text}"
        args.out.write_text(json.dumps(environment() | {"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
