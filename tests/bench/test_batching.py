"""The comparison on the tiny model, with workloads small enough to follow every step by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from jaxserve.bench import batching
from jaxserve.bench.batching import BatchingRow, compare, first_difference, measure
from jaxserve.bench.workload import WorkItem
from tests import tiny

SHORT_BESIDE_LONG = [WorkItem((5, 6, 7, 8 + n), n) for n in (2, 8, 3, 2)]
ALIKE = [WorkItem((5, 6, 7, 8 + i), 4) for i in range(3)]

Rows = dict[tuple[str, str], BatchingRow]


def rows_of(workload: Sequence[WorkItem], **options: Any) -> Rows:
    """Pages of 4 tokens, and prompts of two sequences, 4 tokens each, in one step, which samples their first tokens.
    The second pool has 6 pages, 24 tokens of room: what one sequence of ``max_model_len`` takes."""
    values: dict[str, Any] = {"max_model_len": 24, "page_size": 4, "prefill_sizes": (9,), "max_prefill_rows": 2}
    rows = compare(tiny.CONFIG, tiny.params(), workload, max_num_seqs=2, **values, **options)
    return {(row.comparison, row.mode): row for row in rows}


@pytest.fixture(scope="module")
def short_beside_long() -> Rows:
    return rows_of(SHORT_BESIDE_LONG)


@pytest.fixture(scope="module")
def alike() -> Rows:
    """Each of three sequences comes to hold 7 tokens."""
    return rows_of(ALIKE)


def test_four_modes_with_identical_tokens(short_beside_long: Rows):
    assert list(short_beside_long) == [
        ("batching", "continuous"), ("batching", "static"), ("allocation", "paged"), ("allocation", "static")
    ]  # fmt: skip
    for row in short_beside_long.values():
        assert row.identical_tokens and row.recompilations_after_ready == 0 and row.num_preemptions == 0
        assert (row.num_requests, row.prompt_tokens, row.output_tokens) == (4, 16, 15)
        assert row.requests_per_s == pytest.approx(4 / row.duration_s)
        assert row.output_tokens_per_s == pytest.approx(15 / row.duration_s)
        assert 0 < row.latency_p50_s <= row.latency_p99_s <= row.duration_s


def test_the_same_bytes_on_both_sides(alike: Rows):
    token_bytes = 2 * 4 * 4 * 8 * 4  # K and V, layers, kv heads, head dim, float32
    sizes = {key: (row.max_num_seqs, row.num_pages, row.kv_bytes) for key, row in alike.items()}
    assert sizes["batching", "continuous"] == sizes["batching", "static"] == (2, 12, 48 * token_bytes)
    assert sizes["allocation", "paged"] == sizes["allocation", "static"] == (8, 6, 24 * token_bytes)


def test_static_batching_waits_for_the_longest(short_beside_long: Rows):
    """Batches of outputs 2 and 8, then 3 and 2: eight steps and three."""
    row = short_beside_long["batching", "static"]
    assert row.num_steps == 8 + 3 and row.active_rows_mean == 15 / 11


def test_continuous_batching_fills_the_rows(short_beside_long: Rows):
    """An end is read while the next step runs, so a slot rests for one step between two requests.

    step  1 2 3 4 5 6 7 8 9
    slot  a a . c c c . d d
    slot  b b b b b b b b
    """
    row = short_beside_long["batching", "continuous"]
    assert row.num_steps == 9 and row.active_rows_mean == 15 / 9


def test_static_allocation_wastes_what_it_reserves(alike: Rows):
    """One sequence at a time holds all 24 tokens of room, and 4, 5, 6, 7 tokens; it will never fill 17. Two of the
    three run while others wait."""
    row = alike["allocation", "static"]
    assert (row.num_queue_steps, row.running_mean, row.running_peak) == (8, 1, 1)
    assert row.kv_utilisation_mean == pytest.approx(5.5 / 24) and row.kv_utilisation_peak == pytest.approx(7 / 24)
    assert row.kv_reserved_mean == pytest.approx(1.5 / 24)
    assert row.kv_internal_fragmentation_mean == pytest.approx(17 / 24)
    assert row.kv_unallocated_mean == 0


def test_paged_allocation_holds_twice_the_tokens(alike: Rows):
    """Two sequences at a time hold two pages each, the third waits for the last two pages: one has to stay free."""
    row = alike["allocation", "paged"]
    assert (row.num_queue_steps, row.running_mean, row.running_peak) == (4, 2, 2)
    assert row.kv_utilisation_mean == pytest.approx(11 / 24) and row.kv_utilisation_peak == pytest.approx(14 / 24)
    assert row.kv_reserved_mean == pytest.approx(3 / 24)
    assert row.kv_internal_fragmentation_mean == pytest.approx(2 / 24)
    assert row.kv_unallocated_mean == pytest.approx(8 / 24)


def test_preemptions_are_counted_and_change_no_token():
    """Two sequences that come to hold five pages each, on six."""
    rows = rows_of([WorkItem((5, 6, 7, 8), 16), WorkItem((8, 7, 6, 5), 16)])
    assert rows["allocation", "paged"].num_preemptions > 0
    assert rows["allocation", "static"].num_preemptions == 0
    assert all(row.identical_tokens for row in rows.values())


def test_no_figures_of_memory_when_nobody_waits():
    row = rows_of(ALIKE[:1])["batching", "continuous"]
    assert row.num_queue_steps == 0 and row.num_steps == 4
    assert row.kv_utilisation_mean is row.kv_utilisation_peak is row.kv_unallocated_mean is row.running_peak is None


@pytest.mark.parametrize("name", ["batching", "allocation", "prefix_caching", "max_num_waiting", "memory_fraction"])
def test_what_the_benchmark_decides_cannot_be_set(name: str):
    with pytest.raises(ValueError, match=f"{name}=1"):
        rows_of(ALIKE, **{name: 1})


def test_first_difference():
    assert first_difference([[1, 2], [3]], [[1, 2], [3]]) is None
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == "request 1, output token 1: 5, not 4"


def test_modes_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch):
    calls = iter([[[1, 2, 3, 4]] * 3, [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9, 4]]])

    def measured(*args: Any) -> tuple[BatchingRow, list[list[int]]]:
        row, _ = measure(*args)
        return row, next(calls)

    monkeypatch.setattr(batching, "measure", measured)
    with pytest.raises(RuntimeError, match=r"batching static differs .* request 2, output token 2: 9, not 3"):
        rows_of(ALIKE)
