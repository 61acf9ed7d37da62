"""The engine alone, with no server: latency, decode, prefill and throughput of one model, beside the device's ceilings.

All requests of a measurement are there at its start, greedy, with random token ids, end-of-sequence ignored, no
prefix caching and no text. Definitions:

* TTFT: time of a request with one output token, alone in the engine.
* TPOT at a batch: (time with n + 1 output tokens - time with 1) / n, of the whole batch.
* ITL: gaps between the consecutive tokens of a request, pooled over the requests.
* Of a mesh with stages: a tick is one call of the compiled step, ``ST`` of which are a step of the whole batch; the
  bubble is the share of stages without a step, over the ticks.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxserve.bench.collectives import sent_bytes, textbook_bubble
from jaxserve.bench.roofline import Roofline
from jaxserve.bench.workload import length_varied
from jaxserve.engine.engine import Engine
from jaxserve.engine.step_times import StepTimes
from jaxserve.sampling_params import SamplingParams

WORKLOADS = ("latency", "decode", "prefill", "throughput")
LATENCY_PROMPTS = (128, 1024, 4096)  # tokens
DECODE_BATCHES = (1, 8, 16, 32, 64, 128, 256)
DECODE_PROMPT, DECODE_TOKENS = 896, 64
PREFILL_PROMPTS, PREFILL_PROMPT = 16, 2048
NUM_REQUESTS, MAX_PROMPT, MAX_OUTPUT = 512, 2048, 1024  # of throughput
ENOUGH_STEPS = 16  # of a whole batch: fewer say little

Row = dict[str, Any]


class Drive(NamedTuple):
    """What came of one batch of requests. Times are seconds since its start."""

    duration_s: float
    token_times: list[list[float]]  # of each request's tokens
    steps: list[StepTimes]
    step_ends: list[float]


def drive(engine: Engine, prompts: Sequence[Sequence[int]], num_output_tokens: Sequence[int]) -> Drive:
    """Runs requests that are all there at once to their ends."""
    requests = [
        engine.make_request(p, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True), request_id=str(i))
        for i, (p, n) in enumerate(zip(prompts, num_output_tokens, strict=True))
    ]
    token_times: list[list[float]] = [[] for _ in requests]
    steps: list[StepTimes] = []
    step_ends: list[float] = []
    start = time.perf_counter()
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished():
        events = engine.step(on_times=steps.append)
        now = time.perf_counter() - start
        step_ends.append(now)
        for event in events:
            token_times[int(event.request_id)].append(now)
    duration_s = time.perf_counter() - start
    if (counts := [len(t) for t in token_times]) != list(num_output_tokens):
        raise RuntimeError(f"requests gave {counts} tokens, asked were {list(num_output_tokens)}")
    return Drive(duration_s, token_times, steps, step_ends)


class OfflineBenchmark:
    """Measurements on one engine; each returns a row of figures."""

    def __init__(self, engine: Engine, roofline: Roofline, *, seed: int = 0):
        if engine.cache_config.prefix_caching:
            raise ValueError("prefix_caching=True: repeated prompts would cost nothing, make the engine without")
        self.engine, self.roofline = engine, roofline
        self._random = random.Random(seed)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random prompts of ``length`` tokens, new ones at every call."""
        size = self.engine.model_config.vocab_size
        return [[self._random.randrange(size) for _ in range(length)] for _ in range(count)]

    def latency(self, prompt_len: int, repeats: int = 5) -> Row:
        """TTFT of a prompt, the median of ``repeats``."""
        drives = [drive(self.engine, self.prompts(1, prompt_len), [1]) for _ in range(repeats)]
        times = [1e3 * d.token_times[0][0] for d in drives]
        row = {"workload": "latency", "batch_size": 1, "prompt_len": prompt_len, "num_samples": repeats}
        return row | {"ttft_ms": statistics.median(times)} | percentiles("ttft_ms", times) | self._costs(drives)

    def decode(self, batch_size: int, repeats: int = 1) -> Row:
        """TPOT of a batch, the median of ``repeats``; and ``step_ms`` of the steps in which the whole batch decodes and
        no prompt is read, of which its share of the roofline is.

        Prompts are read by the step's budget, so the first of a large batch have ended before the last begin. Where
        this leaves few steps of the whole batch, a third run with longer outputs has 64.
        """
        tpots, ones, drives = [], [], []
        for _ in range(repeats):
            prompts = self.prompts(batch_size, DECODE_PROMPT)
            ones.append(drive(self.engine, prompts, [1] * batch_size))
            drives.append(drive(self.engine, prompts, [1 + DECODE_TOKENS] * batch_size))
            tpots.append(1e3 * (drives[-1].duration_s - ones[-1].duration_s) / DECODE_TOKENS)
        itl = [1e3 * (b - a) for d in drives for times in d.token_times for a, b in pairwise(times)]
        full = [x for d in drives for x in self._whole_batch_steps(d, batch_size)]
        if len(full) < ENOUGH_STEPS:
            longer = steady_output_len(ones[0])
            prompts = self.prompts(batch_size, DECODE_PROMPT)
            drives = [drive(self.engine, prompts, [longer] * batch_size)]
            full = self._whole_batch_steps(drives[0], batch_size)[:DECODE_TOKENS]
        times = [1e3 * t for _, t in full]
        row = {
            "workload": "decode",
            "batch_size": batch_size,
            "prompt_len": DECODE_PROMPT,
            "num_output_tokens": DECODE_TOKENS,
            "num_samples": repeats,
            "tpot_ms": statistics.median(tpots),
            "output_tokens_per_s": 1e3 * batch_size / statistics.median(tpots),
        }
        num_stages = self.engine.parallel_config.stage
        row |= percentiles("itl_ms", itl) | percentiles("step_ms", [num_stages * t for t in times])
        row |= {"num_whole_batch_steps": len(times)} | self._costs([drives[-1]])
        if full and self.engine.loop.runner.mesh.size > 1:
            row |= self._exchanged(full, batch_size)
        if full:  # there are none where the cache is too small for the batch
            batches = [step.batch.rows for step, _ in full if step.batch is not None]
            row |= self.roofline.of_steps(batches, sum(times) / 1e3)
            row |= percentiles("host_ms", [1e3 * step.host_s for step, _ in full])
            row |= percentiles("dispatch_ms", [1e3 * step.dispatch_s for step, _ in full])
        return row

    def _whole_batch_steps(self, run: Drive, batch_size: int) -> list[tuple[StepTimes, float]]:
        """The steps of ``run`` that decode ``batch_size`` rows and nothing else, and the seconds each took: from the
        moment the step before it was read until it was. With stages, the ticks in which so many rows are in them."""
        read_at = [end for step, end in zip(run.steps, run.step_ends, strict=True) for _ in range(step.num_read)]
        sampled = [step for step in run.steps if step.tick is not None and step.tick.leaving is not None]
        found = []
        for step, (before, read) in zip(sampled[1:], pairwise(read_at), strict=True):  # read in this order
            if step.tick is not None and not step.tick.bucket.prefill_tokens and step.tick.num_rows == batch_size:
                found.append((step, read - before))
        return found

    def _exchanged(self, full: list[tuple[StepTimes, float]], batch_size: int) -> Row:
        """What the ticks ``full`` of a whole batch send between devices, and how many of their stages are idle."""
        parallel, ticks = self.engine.parallel_config, [step.tick for step, _ in full if step.tick is not None]
        bucket = statistics.mode(tick.bucket for tick in ticks)
        sent = sent_bytes(self.engine.loop.runner.program_texts(bucket, "greedy"), parallel.tensor)
        row: Row = {"tensor_mb_a_step": parallel.stage * sent.tensor / 1e6}
        if parallel.stage > 1:
            num_busy = sum(tick.num_busy for tick in ticks)
            row |= percentiles("tick_ms", [1e3 * t for _, t in full])
            row["stage_mb_a_step"] = parallel.stage * sent.stage / 1e6
            row["bubble_percent"] = 100 * (1 - num_busy / (parallel.stage * len(ticks)))
            row["textbook_bubble_percent"] = 100 * textbook_bubble(parallel.stage, min(parallel.stage, batch_size))
        return row

    def prefill(self, num_prompts: int = PREFILL_PROMPTS, prompt_len: int = PREFILL_PROMPT, repeats: int = 3) -> Row:
        """Prompt tokens a second over several prompts, the median of ``repeats``."""
        drives = [drive(self.engine, self.prompts(num_prompts, prompt_len), [1] * num_prompts) for _ in range(repeats)]
        rates = [num_prompts * prompt_len / d.duration_s for d in drives]
        row = {"workload": "prefill", "batch_size": num_prompts, "prompt_len": prompt_len, "num_samples": repeats}
        return row | {"prompt_tokens_per_s": statistics.median(rates)} | self._costs(drives)

    def throughput(self, num_requests: int = NUM_REQUESTS, seed: int = 0) -> Row:
        """Many requests of varied lengths at once (``workload.length_varied``)."""
        items = length_varied(
            num_requests,
            seed=seed,
            max_prompt=MAX_PROMPT,
            max_output=MAX_OUTPUT,
            vocab_size=self.engine.model_config.vocab_size,
        )
        before = self.engine.stats().num_preemptions
        run = drive(self.engine, [x.prompt for x in items], [x.num_output_tokens for x in items])
        num_prompt, num_output = sum(len(x.prompt) for x in items), sum(x.num_output_tokens for x in items)
        row = {
            "workload": "throughput",
            "num_requests": num_requests,
            "prompt_tokens": num_prompt,
            "output_tokens": num_output,
            "duration_s": run.duration_s,
            "output_tokens_per_s": num_output / run.duration_s,
            "requests_per_s": num_requests / run.duration_s,
            "prompt_tokens_per_s": num_prompt / run.duration_s,
            "num_preemptions": self.engine.stats().num_preemptions - before,
        }
        gaps = [1e3 * (b - a) for times in run.token_times for a, b in pairwise(times)]
        tpots = [1e3 * (t[-1] - t[0]) / (len(t) - 1) for t in run.token_times if len(t) > 1]
        ttfts = [1e3 * t[0] for t in run.token_times]
        row |= percentiles("ttft_ms", ttfts) | percentiles("tpot_ms", tpots) | percentiles("itl_ms", gaps)
        return row | self._costs([run])

    def _costs(self, drives: Sequence[Drive]) -> Row:
        """Shares of the ceilings and of the host's time, over all steps of ``drives``."""
        steps = [step for d in drives for step in d.steps]
        duration_s = sum(d.duration_s for d in drives)
        dispatched = [step for step in steps if step.batch is not None]
        batches = [step.batch.rows for step in dispatched if step.batch is not None]
        return {
            "num_steps": len(dispatched),
            **percentiles("host_ms", [1e3 * step.host_s for step in steps]),
            **percentiles("dispatch_ms", [1e3 * step.dispatch_s for step in dispatched]),
            "host_share": sum(step.host_s for step in steps) / duration_s,
            "dispatch_share": sum(step.dispatch_s for step in steps) / duration_s,
            "wait_share": sum(step.wait_s for step in steps) / duration_s,
            "recompilations_after_ready": self.engine.stats().recompilations_after_ready,
            **self.roofline.of_steps(batches, duration_s),
        }

    def run(
        self,
        workloads: Sequence[str] = WORKLOADS,
        *,
        batch_sizes: Sequence[int] = DECODE_BATCHES,
        prompt_lens: Sequence[int] = LATENCY_PROMPTS,
        num_requests: int = NUM_REQUESTS,
        repeats: int = 5,
        on_row: Callable[[Row], None] | None = None,
    ) -> list[Row]:
        """The rows of ``workloads``, each handed to ``on_row`` as soon as it is measured.

        Args:
            repeats: of latency; of the others, which have many samples in one run or take long, fewer.
        """
        drive(self.engine, self.prompts(1, 1), [2])  # what the runtime does on its very first call
        jobs: list[Callable[[], Row]] = []
        for workload in workloads:
            match workload:
                case "latency":
                    jobs += [lambda n=n: self.latency(n, repeats) for n in prompt_lens]
                case "decode":
                    jobs += [lambda b=b: self.decode(b, min(repeats, 3) if b <= 32 else 1) for b in batch_sizes]
                case "prefill":
                    jobs.append(lambda: self.prefill(repeats=min(repeats, 3)))
                case "throughput":
                    jobs.append(lambda: self.throughput(num_requests))
                case _:
                    raise ValueError(f"workload={workload!r} is not one of {', '.join(WORKLOADS)}")
        rows = []
        for job in jobs:
            rows.append(job())
            if on_row is not None:
                on_row(rows[-1])
        return rows


def steady_output_len(one_token: Drive) -> int:
    """Output tokens with which every sequence of a batch is still decoding when the last has decoded
    ``DECODE_TOKENS``: as many more as the batch's prompts take steps."""
    num_prompt_steps = sum(step.batch is not None for step in one_token.steps)
    return DECODE_TOKENS + num_prompt_steps + 2


def percentiles(name: str, values: Sequence[float]) -> Row:
    """``name`` with ``_p50``, ``_p90`` and ``_p99``; None where there are no values."""
    found = np.percentile(values, (50, 90, 99)).tolist() if len(values) else (None,) * 3
    return {f"{name}_p{p}": value for p, value in zip((50, 90, 99), found, strict=True)}


def longest_sequence(
    workloads: Sequence[str], prompt_lens: Sequence[int], batch_sizes: Sequence[int], budget: int
) -> int:
    """Tokens of the longest sequence of ``workloads``, for an engine that reads ``budget`` prompt tokens a step."""
    largest = max(batch_sizes, default=0)
    prompt_steps = largest + -(-largest * DECODE_PROMPT // budget)  # at worst: few prompts may share a step
    lengths = {
        "latency": max(prompt_lens, default=0) + 1,
        "decode": DECODE_PROMPT + DECODE_TOKENS + 3 + prompt_steps,
        "prefill": PREFILL_PROMPT + 1,
        "throughput": MAX_PROMPT + MAX_OUTPUT,
    }
    return max(lengths[w] for w in workloads)
