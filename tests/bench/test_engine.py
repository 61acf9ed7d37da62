"""The workloads on a tiny model. From a command to lines, a file and a table: tests/cli/test_measuring.py."""

import io
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jaxserve.bench import engine as bench
from jaxserve.bench import offline, report
from jaxserve.bench.ceilings import Ceilings
from jaxserve.bench.offline import OfflineBenchmark, drive, longest_sequence, percentiles, steady_output_len
from jaxserve.bench.roofline import Roofline
from jaxserve.config import CacheConfig
from jaxserve.engine import loop
from jaxserve.engine.engine import Engine
from tests import tiny

CEILINGS = Ceilings(
    read_gb_per_s=10,
    copy_read_plus_write_gb_per_s=10,
    reduce_read_gb_per_s=10,
    skinny_product_gb_per_s=10,
    tflop_per_s=0.1,
    dtype="float32",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Prompts of 8 tokens, two of which a step reads; steps of 1 and of 4 rows."""
    options: dict[str, Any] = {"max_num_seqs": 4, "decode_sizes": (1, 4), "samplings": ("greedy",)}
    with tiny.engine(prefix_caching=False, num_pages=400, max_model_len=200, **options) as engine:
        yield engine


@pytest.fixture
def bench_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> OfflineBenchmark:
    monkeypatch.setattr(offline, "DECODE_PROMPT", 8)
    return OfflineBenchmark(engine, Roofline.of(tiny.CONFIG, 4, CEILINGS))


def test_a_drive_times_every_token_and_step(engine: Engine):
    run = drive(engine, [[5] * 8, [6] * 8, [7] * 8], [3, 1, 2])
    assert [len(t) for t in run.token_times] == [3, 1, 2]
    assert all(0 < a <= b <= run.duration_s for t in run.token_times for a, b in pairwise(t))
    batches = [step.batch for step in run.steps if step.batch is not None]
    # Two prompts of 8 fill a step of 16; then the third's, beside a row that decodes; and so on.
    assert [[r.num_new_tokens for r in b.rows] for b in batches][:2] == [[8, 8], [1, 8]]
    assert sum(r.samples for b in batches for r in b.rows) == 6
    last = run.steps[-1]
    assert last.batch is None and last.wait_s > 0 and last.commit_s > 0 and last.dispatch_s == 0
    assert last.host_s == last.schedule_s + last.build_s + last.commit_s


def test_the_parts_of_steps_are_most_of_a_drive(engine: Engine):
    """Of one at least of some: a busy machine takes its time at any place, and not at the same one each time."""
    parts = ("schedule_s", "build_s", "dispatch_s", "wait_s", "commit_s")
    shares = []
    for _ in range(5):
        run = drive(engine, [[5] * 8, [6] * 8, [7] * 8], [3, 1, 2])
        shares.append(sum(getattr(step, part) for step in run.steps for part in parts) / run.duration_s)
    assert 0.5 < max(shares) <= 1


@pytest.mark.parametrize("lookahead", [1, 2])
def test_tpot_is_the_difference_over_the_tokens(
    lookahead: int, bench_of: OfflineBenchmark, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "SHORT_WAIT_S", math.inf)
    scheduler = bench_of.engine.loop.scheduler
    monkeypatch.setattr(scheduler, "config", replace(scheduler.config, lookahead=lookahead))
    durations = []

    def noted(*args: Any) -> Any:
        durations.append(drive(*args))
        return durations[-1]

    monkeypatch.setattr(offline, "drive", noted)
    row = bench_of.decode(4)
    one, more = durations
    assert [len(t) for t in one.token_times] == [1] * 4 and [len(t) for t in more.token_times] == [65] * 4
    assert row["tpot_ms"] == pytest.approx(1e3 * (more.duration_s - one.duration_s) / 64)
    # The second step has room for a prompt and a part beside the rows that decode: the last prompt ends two steps after
    # the first two, which so decode two steps less with it: 62.
    assert row["num_whole_batch_steps"] == 62 and row["step_ms_p50"] > 0
    assert row["itl_ms_p50"] > 0 and 0 < row["roofline_percent"] < 100


def test_a_batch_that_never_decodes_as_a_whole_gets_longer_outputs(
    bench_of: OfflineBenchmark, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(offline, "DECODE_TOKENS", 2)
    monkeypatch.setattr(offline, "ENOUGH_STEPS", 2)
    row = bench_of.decode(4)
    assert row["num_whole_batch_steps"] == 2
    one = drive(bench_of.engine, [[5] * 8] * 4, [1] * 4)
    assert steady_output_len(one) == 2 + 2 + 2


def test_prefill_and_throughput(bench_of: OfflineBenchmark, monkeypatch: pytest.MonkeyPatch):
    row = bench_of.prefill(3, 20, repeats=1)
    assert (row["batch_size"], row["num_steps"]) == (3, 4) and row["prompt_tokens_per_s"] > 0  # 60 tokens by 16
    monkeypatch.setattr(offline, "MAX_PROMPT", 40)
    monkeypatch.setattr(offline, "MAX_OUTPUT", 20)
    row = bench_of.throughput(9)
    assert row["output_tokens_per_s"] == pytest.approx(row["output_tokens"] / row["duration_s"])
    assert row["requests_per_s"] == pytest.approx(9 / row["duration_s"])
    assert row["ttft_ms_p50"] <= row["ttft_ms_p99"] and row["recompilations_after_ready"] == 0


def test_shares_of_time_are_of_the_whole(bench_of: OfflineBenchmark):
    rows = [bench_of.latency(16, repeats=2) for _ in range(3)]
    assert all(row["ttft_ms"] == pytest.approx(row["ttft_ms_p50"]) for row in rows)
    assert 0.5 < max(row["host_share"] + row["dispatch_share"] + row["wait_share"] for row in rows) <= 1


def test_a_mesh_says_what_it_sends_and_what_is_idle(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(offline, "DECODE_PROMPT", 8)
    options: dict[str, Any] = {"max_num_seqs": 4, "decode_sizes": (2, 4), "samplings": ("greedy",), "num_pages": 400}
    with tiny.engine(mesh="stage=2,tensor=2", prefix_caching=False, max_model_len=200, **options) as engine:
        row = OfflineBenchmark(engine, Roofline.of(tiny.CONFIG, 4, CEILINGS, 4)).decode(4)
    assert row["bubble_percent"] == 0 and row["textbook_bubble_percent"] == pytest.approx(100 / 3)
    assert row["step_ms_p50"] == pytest.approx(2 * row["tick_ms_p50"])
    # Of two rows: on to the next stage, and from the last one to all for the head, on both devices of a stage; the sum
    # of the embedding is over all four, of whom every other one's neighbour is in the other stage; a few numbers a row.
    activations = 2 * tiny.CONFIG.hidden_size * 4
    embedding = 2 * activations * 3 / 2
    assert row["stage_mb_a_step"] == pytest.approx(2 * (6 * activations + embedding) / 1e6, rel=0.1)
    console = Console(file=io.StringIO(), width=80)
    about = {"model": "tiny", "dtype": "float32", "device": "CPU", "driver": None, "versions": {}, "commit": None}
    report.print_engine(
        [row | about | {"ceilings": asdict(CEILINGS), "mesh": "stage=2,tensor=2", "command": ""}], console
    )
    table = console.file.getvalue().partition("decode on stage=2,tensor=2")[2]  # pyright: ignore[reportAttributeAccessIssue]
    figures = (row["step_ms_p50"], row["tick_ms_p50"], row["bubble_percent"], row["textbook_bubble_percent"])
    assert all(f"{x:.2f}"[:-1] in table for x in figures) and "stage MB" in table and "tensor MB" in table
    # Two sums in each layer of a stage, in both stages, the rest of the embedding's, and a few numbers a row.
    assert row["tensor_mb_a_step"] == pytest.approx(2 * (2 * 4 * 2 * activations + embedding) / 1e6, rel=0.1)


def test_prefix_caching_is_refused():
    engine: Any = SimpleNamespace(cache_config=CacheConfig(num_pages=1, prefix_caching=True))
    with pytest.raises(ValueError, match="prefix_caching=True"):
        OfflineBenchmark(engine, Roofline.of(tiny.CONFIG, 4, CEILINGS))


def test_the_longest_sequence():
    assert longest_sequence(["latency"], [128, 4096], [256], 2048) == 4097
    assert longest_sequence(["throughput"], [], [], 2048) == 3072
    assert longest_sequence(["decode"], [128], [256], 2048) >= 896 + 64 + 112


def test_percentiles_of_nothing():
    assert percentiles("x", []) == {"x_p50": None, "x_p90": None, "x_p99": None}


@pytest.mark.parametrize(
    "options, match",
    [
        ({"workload": ("speed",)}, "workload='speed' is not one of latency, decode"),
        ({"workload": ()}, "workload is empty"),
        ({"batch_sizes": (0, 1)}, r"batch_sizes=\(0, 1\)"),
        ({"repeats": 0}, "repeats=0"),
        ({"prefix_caching": True}, "prefix_caching=True: the benchmark decides it"),
        ({"load_format": "dumb"}, "load_format='dumb'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: CEILINGS)
    with pytest.raises(ValueError, match=match):
        bench.run("no-such-model", **options)
