"""The scheduler by hand: each case small enough to be followed on paper."""

import pytest

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.errors import QueueFullError, RequestError
from jaxserve.request import STEP_TOKEN_BOUNDS
from jaxserve.scheduler.scheduler import Scheduler
from tests.scheduler.by_hand import ANY, commit, make_scheduler, next_batch, shape
from tests.scheduler.fake_engine import EOS_ID, FakeEngine, dims_of, make_request


def test_a_prompt_is_cut_where_padding_costs_more_than_a_step():
    scheduler = make_scheduler(prefill_sizes=(512, 2048), num_pages=2000, max_model_len=4000)
    scheduler.add(make_request("a", [5] * 700, 3))
    scheduler.add(make_request("b", [5] * 500, 3))
    batch = next_batch(scheduler)  # 1,200 tokens: three steps of 512 cost as much as one of 2,048
    assert shape(batch) == [("a", 0, 700, True), ("b", 0, 500, True)] and batch.bucket[1] == 2048
    scheduler = make_scheduler(prefill_sizes=(512, 2048), num_pages=2000, max_model_len=4000)
    scheduler.add(make_request("a", [5] * 700, 3))
    scheduler.add(make_request("b", [5] * 300, 3))
    batch = next_batch(scheduler)
    assert shape(batch) == [("a", 0, 512, False)] and batch.bucket[1] == 512
    commit(scheduler, batch)
    batch = next_batch(scheduler)  # b was admitted with the first step, and waits for its turn
    assert shape(batch) == [("a", 512, 188, True), ("b", 0, 300, True)] and batch.bucket[1] == 512


def test_a_prompt_in_chunks_then_one_token_a_step():
    scheduler = make_scheduler(prefill_sizes=(2, 4), max_num_seqs=3)
    scheduler.add(make_request("a", [5] * 6, 3))
    first = next_batch(scheduler)
    assert shape(first) == [("a", 0, 4, False)] and first.bucket == (0, 4, 4)
    assert commit(scheduler, first) == []
    second = next_batch(scheduler)
    assert shape(second) == [("a", 4, 2, True)] and second.bucket == (0, 2, 2)
    [token] = commit(scheduler, second)
    assert token[1:] == (0, ANY, 0, None, None) and token.request_id == "a"
    third = next_batch(scheduler)
    assert shape(third) == [("a", 6, 1, True)] and third.bucket == (1, 0, 0)
    commit(scheduler, third)
    fourth = next_batch(scheduler)
    [last] = commit(scheduler, fourth)
    assert (last.index, last.finish_reason, last.stop_reason) == (2, "length", None)
    assert scheduler.schedule() is None and not scheduler.has_unfinished()


def test_decode_rows_and_a_prompt_chunk_share_a_step():
    scheduler = make_scheduler(prefill_sizes=(8,))
    scheduler.add(make_request("a", [5] * 3, 9))
    commit(scheduler, next_batch(scheduler))
    scheduler.add(make_request("b", [6] * 10, 9))
    batch = next_batch(scheduler)
    assert shape(batch) == [("a", 3, 1, True), ("b", 0, 7, False)]
    assert batch.bucket == (4, 8, 4) and batch.num_decode_rows == 1
    [token] = commit(scheduler, batch, 2, 3)
    assert (token.request_id, token.row, token.token) == ("a", 0, 2)
    batch = next_batch(scheduler)
    assert shape(batch) == [("a", 4, 1, True), ("b", 7, 3, True)]
    assert [(t.request_id, t.row, t.token) for t in commit(scheduler, batch, 2, 3)] == [("a", 0, 2), ("b", 4, 3)]


def test_a_single_token_prompt_takes_a_decode_row():
    scheduler = make_scheduler(prefill_sizes=(5,))
    scheduler.add(make_request("a", [5], 2))
    scheduler.add(make_request("b", [6] * 5, 2))
    batch = next_batch(scheduler)
    assert shape(batch) == [("a", 0, 1, True), ("b", 0, 4, False)] and batch.num_decode_rows == 1
    commit(scheduler, batch)
    assert shape(next_batch(scheduler)) == [("a", 1, 1, True), ("b", 4, 1, True)]


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_max_prefill_rows_and_the_token_budget_bound_a_step(batching):
    scheduler = make_scheduler(prefill_sizes=(8,), max_prefill_rows=2, batching=batching)
    for name in "abcd":
        scheduler.add(make_request(name, [5] * 3, 2))
    batch = next_batch(scheduler)
    assert shape(batch) == [("a", 0, 3, True), ("b", 0, 3, True)]
    commit(scheduler, batch)
    rest = [("a", 3, 1, True), ("b", 3, 1, True), ("c", 0, 3, True), ("d", 0, 3, True)]
    assert shape(next_batch(scheduler)) == rest
    scheduler = make_scheduler(prefill_sizes=(8,), batching=batching)
    for name in "abcd":
        scheduler.add(make_request(name, [5] * 3, 2))
    assert shape(next_batch(scheduler)) == [("a", 0, 3, True), ("b", 0, 3, True), ("c", 0, 2, False)]


def test_lookahead_schedules_past_an_unread_token_and_drops_the_wasted_one():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("a", [5] * 4, 9, stop_token_ids=(3,)))
    first, second = next_batch(scheduler), next_batch(scheduler)
    assert shape(second) == [("a", 4, 1, True)]
    [token] = commit(scheduler, first, 3)
    assert (token.finish_reason, token.stop_reason) == ("stop", 3)
    assert scheduler.stats().num_pages_held == 0
    assert commit(scheduler, second) == []
    assert scheduler.stats().generation_tokens == 1


def test_lookahead_does_not_pass_the_length_limit():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [5] * 4, 2))
    first, second = next_batch(scheduler), next_batch(scheduler)
    assert scheduler.schedule() is None  # its last token is in flight
    assert [t.finish_reason for t in commit(scheduler, first)] == [None]
    assert [t.finish_reason for t in commit(scheduler, second)] == ["length"]


def test_end_of_sequence_has_no_stop_reason_unless_the_params_name_it():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [5], 9, stop_token_ids=(3,)))
    scheduler.add(make_request("b", [5], 9, stop_token_ids=(EOS_ID,)))
    scheduler.add(make_request("c", [5], 9, eos=False))
    tokens = commit(scheduler, next_batch(scheduler), EOS_ID, EOS_ID, EOS_ID)
    assert [t[4:] for t in tokens] == [("stop", None), ("stop", EOS_ID), (None, None)]


def test_admission_by_priority_then_arrival_then_number():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("late", [5], 1, arrival=2.0))
    scheduler.add(make_request("early", [5], 1, arrival=1.0))
    scheduler.add(make_request("early too", [5], 1, arrival=1.0))
    scheduler.add(make_request("urgent", [5], 1, arrival=3.0, priority=-1))
    served = []
    while (batch := scheduler.schedule()) is not None:
        served += [t.request_id for t in commit(scheduler, batch)]
    assert served == ["urgent", "early", "early too", "late"]


def test_nobody_passes_a_head_that_does_not_fit():
    scheduler = make_scheduler(num_pages=6)
    scheduler.add(make_request("runs", [5] * 8, 8))  # 3 pages: 8 tokens and one more
    commit(scheduler, next_batch(scheduler))
    scheduler.add(make_request("head", [5] * 11, 8))  # 3 pages, but 1 is kept free while others run
    scheduler.add(make_request("small", [5], 1))
    assert shape(next_batch(scheduler)) == [("runs", 8, 1, True)]
    assert scheduler.stats().num_waiting == 2
    scheduler.abort("runs")
    assert shape(next_batch(scheduler)) == [("small", 0, 1, True), ("head", 0, 11, True)]


def test_a_shared_prefix_is_computed_once():
    scheduler = make_scheduler(prefix_caching=True)
    scheduler.add(make_request("a", [5] * 8 + [1], 9))
    commit(scheduler, next_batch(scheduler))
    scheduler.add(make_request("b", [5] * 8 + [2, 3], 9))
    scheduler.add(make_request("same", [5] * 8, 9))
    batch = next_batch(scheduler)
    assert shape(batch) == [("a", 9, 1, True), ("b", 8, 2, True), ("same", 4, 4, True)]
    a, b, same = (scheduler.get(name) for name in ("a", "b", "same"))
    assert a is not None and b is not None and same is not None
    assert a.pages[:2] == b.pages[:2] and a.pages[0] == same.pages[0] and same.pages[1] not in a.pages + b.pages
    assert (a.num_cached, b.num_cached, same.num_cached) == (0, 8, 4)
    stats = scheduler.stats()
    # a: 3 pages, 10 tokens; b: one page more, 2 tokens; same: two pages more, 4 tokens.
    assert (stats.num_pages_held, stats.num_tokens_held) == (6, 16)
    assert stats.kv_cache_usage == 6 / 16 and stats.kv_fragmentation == 1 - 16 / 24
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (9 + 10 + 8, 8 + 4)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.num_active_rows) == (27, 1, 3)


def test_a_group_computes_its_prompt_once():
    scheduler = make_scheduler(prefix_caching=True, prefill_sizes=(8,))
    scheduler.add_group([make_request(name, [5] * 13, 9, seed=i) for i, name in enumerate("abc")])
    scheduler.add(make_request("behind", [6], 9))
    first = next_batch(scheduler)
    second = next_batch(scheduler)  # lookahead: nothing is committed yet
    assert shape(first) == [("a", 0, 8, False)] and shape(second) == [("a", 8, 5, True)]
    third = next_batch(scheduler)
    assert shape(third) == [("a", 13, 1, True), ("b", 12, 1, True), ("c", 12, 1, True), ("behind", 0, 1, True)]
    a, b, c = (scheduler.get(name) for name in "abc")
    assert a is not None and b is not None and c is not None
    assert a.pages[:3] == b.pages[:3] == c.pages[:3] and len({s.pages[3] for s in (a, b, c)}) == 3
    assert [s.num_cached for s in (a, b, c)] == [0, 12, 12]


def test_a_group_does_not_wait_for_who_is_gone_or_for_pages_that_are_not_kept():
    scheduler = make_scheduler(prefix_caching=True, prefill_sizes=(8,))
    scheduler.add_group([make_request(name, [5] * 13, 9) for name in "ab"])
    next_batch(scheduler)
    scheduler.abort("a")
    assert shape(next_batch(scheduler)) == [("b", 8, 5, True)]  # the first page and the second are found
    scheduler = make_scheduler(prefix_caching=False)
    scheduler.add_group([make_request(name, [5] * 7, 9) for name in "ab"])
    assert shape(next_batch(scheduler)) == [("a", 0, 7, True), ("b", 0, 7, True)]


def test_a_page_that_this_step_writes_is_not_matched_in_it():
    scheduler = make_scheduler(prefix_caching=True, prefill_sizes=(7,))
    scheduler.add_group([make_request(name, [5] * 8, 9) for name in "ab"])
    scheduler.add(make_request("longer", [5] * 8 + [6], 9))
    assert shape(next_batch(scheduler)) == [("a", 0, 7, False)]
    # a's last prompt token fills its second page now: whoever is admitted now finds only the first.
    assert shape(next_batch(scheduler)) == [("a", 7, 1, True), ("b", 4, 4, True), ("longer", 4, 2, False)]


def test_a_group_is_queued_whole_or_not_at_all():
    scheduler = make_scheduler(max_num_waiting=2)
    scheduler.add(make_request("x", [5], 5))
    with pytest.raises(QueueFullError, match="1 requests are waiting, max_num_waiting=2: no room for 2 more"):
        scheduler.add_group([make_request(name, [5], 5) for name in "ab"])
    assert scheduler.stats().num_waiting == 1 and scheduler.get("a") is None


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_abort_at_every_moment_of_a_life(lookahead):
    cache = CacheConfig(num_pages=6, page_size=2)
    config = SchedulerConfig(
        max_model_len=12, max_num_seqs=2, prefill_sizes=(3,), decode_sizes=(2,), lookahead=lookahead
    )
    for num_steps in range(12):
        engine = FakeEngine(cache, config)
        engine.add(make_request("gone", [1, 2, 3, 4], 6, eos=False))
        engine.add(make_request("stays", [1, 2, 3, 5], 6, eos=False))
        for _ in range(num_steps):
            engine.step()
        unfinished = "gone" not in engine.reasons
        assert engine.end("gone", "abort") == unfinished
        assert not engine.end("gone", "abort")
        engine.check_state()
        engine.add(make_request("gone again", [1, 2, 3, 4], 6, eos=False))
        engine.drain()


def test_an_id_is_free_again_after_its_end_even_with_a_token_in_flight():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [5], 9))
    first = next_batch(scheduler)
    assert scheduler.abort("a")
    scheduler.add(make_request("a", [6, 7], 9))
    second = next_batch(scheduler)
    assert commit(scheduler, first) == []
    assert [t.sequence.tokens for t in commit(scheduler, second, 4)] == [[6, 7, 4]]


def test_expire():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("runs", [5], 9, deadline=50.0))
    next_batch(scheduler)
    scheduler.add(make_request("waits", [5], 9, deadline=60.0))
    scheduler.add(make_request("later", [5], 9, deadline=101.0))
    scheduler.add(make_request("never", [5], 9))
    assert scheduler.expire(49.0) == []
    assert sorted(scheduler.expire()) == ["runs", "waits"]  # the clock says 100
    assert shape(next_batch(scheduler)) == [("later", 0, 1, True)]


def test_finish_records_the_reason_and_keeps_the_prefix():
    scheduler = make_scheduler(prefix_caching=True)
    sequence = scheduler.add(make_request("a", [5] * 8, 9))
    commit(scheduler, next_batch(scheduler))
    assert scheduler.finish("a", "stop") and sequence.finish_reason == "stop"
    assert not scheduler.finish("a", "stop")
    assert scheduler.stats().num_pages_cached == 2 and scheduler.stats().num_pages_held == 0


def test_what_a_step_in_flight_writes_is_kept_too():
    scheduler = make_scheduler(prefix_caching=True)
    scheduler.add(make_request("a", [5] * 9, 9))
    next_batch(scheduler)
    scheduler.abort("a")
    scheduler.add(make_request("b", [5] * 9, 9))
    assert shape(next_batch(scheduler)) == [("b", 8, 1, True)]


def test_static_batching_admits_only_into_an_empty_batch():
    scheduler = make_scheduler(batching="static", prefill_sizes=(5,), max_num_seqs=3, decode_sizes=(1, 2, 3))
    scheduler.add(make_request("short", [5], 1))
    scheduler.add(make_request("long", [5] * 6, 3))
    scheduler.add(make_request("third", [5] * 6, 3))
    scheduler.add(make_request("next", [5], 1))
    batch = next_batch(scheduler)
    assert shape(batch) == [("short", 0, 1, True), ("long", 0, 4, False)]
    assert scheduler.stats().num_running == 3  # admitted all at once, whatever the budget
    commit(scheduler, batch)
    assert scheduler.stats().num_idle_rows == 1
    seen = []
    while scheduler.stats().num_running:
        batch = next_batch(scheduler)
        seen += [name for name, *_ in shape(batch)]
        if not batch.bucket.prefill_tokens:
            assert batch.bucket == (3, 0, 0)  # the idle rows are computed too
        commit(scheduler, batch)
    assert "next" not in seen
    assert shape(next_batch(scheduler)) == [("next", 0, 1, True)]


def test_static_allocation_reserves_max_model_len():
    scheduler = make_scheduler(num_pages=7, allocation="static", max_model_len=12)
    for name in "abc":
        scheduler.add(make_request(name, [5] * 2, 3))
    next_batch(scheduler)
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_held, stats.num_tokens_held) == (2, 1, 6, 4)
    assert stats.num_tokens_reserved == 2 * 2  # five tokens each, of which the last one's KV is never computed
    assert stats.kv_fragmentation == 1 - 4 / 24


@pytest.mark.parametrize(
    ("request_values", "field", "numbers"),
    [
        ({"prompt": [5] * 40, "max_tokens": 25}, "max_total_len", ("65", "max_model_len=64")),
        ({"prompt": [5] * 40, "max_tokens": 9}, "max_total_len", ("49", "48", "12 pages of 4")),
        ({"prompt": [], "max_tokens": 5}, "prompt_token_ids", ("empty",)),
        ({"prompt": [5], "max_tokens": 5, "min_tokens": 1, "stop_token_ids": (1, 2)}, "stop_token_ids", ("3", "2")),
    ],
)
def test_what_can_never_be_served_is_refused(request_values, field, numbers):
    scheduler = make_scheduler(num_pages=12)
    with pytest.raises(RequestError) as caught:
        scheduler.add(make_request("a", **request_values))
    assert caught.value.field == field and all(number in str(caught.value) for number in numbers)
    assert not scheduler.has_unfinished()


def test_many_stop_ids_are_fine_without_min_tokens():
    make_scheduler().add(make_request("a", [5], 5, stop_token_ids=(1, 2, 3, 4)))


@pytest.mark.parametrize("prompt_len", [1, 7, 8, 11])
def test_the_largest_request_that_fits_alone_finishes(prompt_len):
    scheduler = make_scheduler(num_pages=3)
    scheduler.add(make_request("a", [5] * prompt_len, 12 - prompt_len, eos=False))
    finished = []
    while (batch := scheduler.schedule()) is not None:
        finished += [t.finish_reason for t in commit(scheduler, batch)]
    assert finished == [None] * (11 - prompt_len) + ["length"] and scheduler.stats().num_preemptions == 0


def test_duplicate_id_and_full_queue():
    scheduler = make_scheduler(max_num_waiting=2)
    scheduler.add(make_request("a", [5], 5))
    with pytest.raises(RequestError, match="'a' is already in use"):
        scheduler.add(make_request("a", [5], 5))
    scheduler.add(make_request("b", [5], 5))
    with pytest.raises(QueueFullError, match="2 requests are waiting, max_num_waiting=2"):
        scheduler.add(make_request("c", [5], 5))
    next_batch(scheduler)
    scheduler.add(make_request("c", [5], 5))


def test_configs_that_disagree_are_refused():
    cache = CacheConfig(num_pages=8, page_size=4)
    config = SchedulerConfig(max_model_len=64, max_num_seqs=2, prefill_sizes=(8,), decode_sizes=(2,))
    dims = dims_of(CacheConfig(num_pages=9, page_size=4), config)
    with pytest.raises(ValueError, match=r"num_pages=9 .* 8"):
        Scheduler(cache, config, dims)
    static = CacheConfig(num_pages=8, page_size=4, allocation="static")
    with pytest.raises(ValueError, match="16 pages a sequence, num_pages=8"):
        Scheduler(static, config, dims_of(static, config))


def test_steps_are_counted_by_their_tokens():
    scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", [5] * 10, 3))
    assert sequence.admitted_at is None
    while scheduler.has_unfinished():  # a step of 10 tokens, two of 1
        commit(scheduler, next_batch(scheduler))
    stats = scheduler.stats()
    assert stats.step_tokens == 12 and sequence.admitted_at == 100.0
    assert {STEP_TOKEN_BOUNDS[i]: n for i, n in enumerate(stats.steps_by_size) if n} == {1: 2, 16: 1}


def test_page_map_says_who_holds_what():
    scheduler = make_scheduler(prefix_caching=True, max_num_seqs=2)
    scheduler.add(make_request("a", [5] * 9, 5))
    commit(scheduler, next_batch(scheduler))
    scheduler.add(make_request("b", [5] * 9, 5))
    scheduler.add(make_request("c", [7] * 9, 5))
    next_batch(scheduler)
    found = scheduler.page_map()
    a, b, c = found.sequences
    assert (a.request_id, a.is_running, a.num_tokens, a.num_output_tokens, len(a.pages)) == ("a", True, 10, 1, 3)
    assert b.is_running and a.pages[:2] == b.pages[:2] and a.pages[2] != b.pages[2]  # two full pages are shared
    assert not c.is_running and c.pages == () and found.cached == ()
    for name in "abc":
        scheduler.abort(name)
    found = scheduler.page_map()
    assert found.sequences == () and set(found.cached) == set(a.pages[:2])
    assert (found.num_pages, found.page_size) == (16, 4)
