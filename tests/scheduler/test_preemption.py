"""Who gives its pages away, and what becomes of it: by hand, as ``test_scheduler``."""

from jaxserve.scheduler.scheduler import Scheduler
from tests.scheduler.by_hand import ANY, commit, make_scheduler, next_batch, shape
from tests.scheduler.fake_engine import EOS_ID, make_request


def two_running() -> Scheduler:
    """Two sequences in 4 of 5 pages, with nothing scheduled yet: their ninth tokens want one page each."""
    scheduler = make_scheduler(num_pages=5)
    scheduler.add(make_request("old", [5] * 7, 9, arrival=1.0))
    scheduler.add(make_request("young", [6] * 7, 9, arrival=2.0))
    return scheduler


def test_preemption_takes_the_youngest_and_recomputes_it():
    scheduler = two_running()
    commit(scheduler, next_batch(scheduler))
    commit(scheduler, next_batch(scheduler), 2, 3)  # both have 9 tokens, 8 of them computed, in 2 pages each
    batch = next_batch(scheduler)
    assert shape(batch) == [("old", 8, 1, True)]  # took the fifth page, so "young" had to go
    young = scheduler.get("young")
    assert young is not None and (young.status, young.pages, young.num_preemptions) == ("waiting", [], 1)
    assert scheduler.stats().num_preemptions == 1 and scheduler.stats().num_waiting == 1
    commit(scheduler, batch, EOS_ID)
    batch = next_batch(scheduler)
    assert shape(batch) == [("young", 0, 9, True)]
    [token] = commit(scheduler, batch, 4)
    assert (token.index, young.tokens) == (2, [6] * 7 + [ANY, 3, 4])


def test_a_preempted_sequence_gets_its_token_in_flight_before_it_returns():
    scheduler = two_running()
    first, second = next_batch(scheduler), next_batch(scheduler)
    commit(scheduler, first)
    third = next_batch(scheduler)  # "young" is preempted while ``second`` is in flight
    assert shape(third) == [("old", 8, 1, True)]
    young = scheduler.get("young")
    assert young is not None and young.num_in_flight == 1
    scheduler.abort("old")  # every page is free now, yet "young" must wait for its token
    assert scheduler.schedule() is None
    assert [(t.request_id, t.token, t.index) for t in commit(scheduler, second, 2, 3)] == [("young", 3, 1)]
    assert shape(next_batch(scheduler)) == [("young", 0, 9, True)]
    assert commit(scheduler, third) == []


def test_a_preempted_sequence_may_end_by_its_token_in_flight():
    scheduler = two_running()
    first, second = next_batch(scheduler), next_batch(scheduler)
    commit(scheduler, first)
    next_batch(scheduler)
    tokens = commit(scheduler, second, ANY, EOS_ID)
    assert [(t.request_id, t.finish_reason) for t in tokens] == [("old", None), ("young", "stop")]
    assert scheduler.stats().num_waiting == 0 and scheduler.get("young") is None


def test_nobody_is_admitted_in_the_step_of_a_preemption():
    scheduler = make_scheduler(num_pages=6, max_num_seqs=2)
    scheduler.add(make_request("old", [5] * 5, 9))  # 2 pages, a third after 8 tokens
    scheduler.add(make_request("young", [6] * 9, 9, priority=1))  # 3 pages
    commit(scheduler, next_batch(scheduler))
    scheduler.add(make_request("tiny", [7], 2))  # better than "young", but both slots are taken
    for _ in range(3):
        commit(scheduler, next_batch(scheduler))  # 8 and 12 tokens computed
    batch = next_batch(scheduler)  # "old" takes the last page, "young" goes and leaves three
    assert shape(batch) == [("old", 8, 1, True)]
    commit(scheduler, batch)
    assert shape(next_batch(scheduler)) == [("old", 9, 1, True), ("tiny", 0, 1, True)]


def test_a_sequence_is_preempted_in_the_middle_of_its_prompt():
    scheduler = make_scheduler(num_pages=6, prefill_sizes=(3,), max_num_seqs=2)
    scheduler.add(make_request("old", [5] * 4, 9, eos=False))  # 2 pages: 4 tokens and one more
    for _ in range(2):
        commit(scheduler, next_batch(scheduler))
    scheduler.add(make_request("young", [6] * 11, 9))  # 3 pages, and one is left
    for i in range(4):
        batch = next_batch(scheduler)
        assert shape(batch) == [("old", 4 + i, 1, True), ("young", 2 * i, 2, False)]
        commit(scheduler, batch)
    assert scheduler.pool.allocate(1) is not None  # somebody else took it
    batch = next_batch(scheduler)
    assert shape(batch) == [("old", 8, 1, True)]
    young = scheduler.get("young")
    assert young is not None and (young.status, young.num_computed) == ("waiting", 0)


def test_priority_decides_before_age_who_is_preempted():
    scheduler = make_scheduler(num_pages=5)
    scheduler.add(make_request("young", [6] * 8, 9, arrival=2.0))  # 3 pages: 8 tokens and one more
    scheduler.add(make_request("old", [5] * 3, 9, arrival=1.0, priority=1))  # 1 page, a second after 4 tokens
    for _ in range(5):
        commit(scheduler, next_batch(scheduler))
    assert scheduler.stats().num_pages_held == 5
    assert shape(next_batch(scheduler)) == [("young", 12, 1, True)]
    old = scheduler.get("old")
    assert old is not None and old.num_preemptions == 1


def test_the_worst_preempts_itself():
    scheduler = make_scheduler(num_pages=8, prefill_sizes=(32,))
    scheduler.add(make_request("first", [5] * 3, 9))  # 1 page, a second after 4 tokens
    scheduler.add(make_request("second", [6] * 8, 9))  # 3 pages, a fourth after 12
    scheduler.add(make_request("third", [7] * 11, 9))  # 3 pages, a fourth after 12
    assert shape(next_batch(scheduler)) == [("first", 0, 3, True), ("second", 0, 8, True), ("third", 0, 11, True)]
    assert shape(next_batch(scheduler)) == [("first", 3, 1, True), ("second", 8, 1, True), ("third", 11, 1, True)]
    # "first" takes the eighth page, and "third" wants one too.
    assert shape(next_batch(scheduler)) == [("first", 4, 1, True), ("second", 9, 1, True)]
    assert [s.num_preemptions for name in ("first", "second", "third") if (s := scheduler.get(name))] == [0, 0, 1]


def test_recomputation_finds_its_pages_in_the_prefix_cache():
    scheduler = make_scheduler(num_pages=5, prefix_caching=True)
    scheduler.add(make_request("old", [5] * 7, 9, arrival=1.0))
    scheduler.add(make_request("young", [6] * 7, 9, arrival=2.0))
    commit(scheduler, next_batch(scheduler))
    commit(scheduler, next_batch(scheduler), 2, 3)
    commit(scheduler, next_batch(scheduler), EOS_ID)
    assert shape(next_batch(scheduler)) == [("young", 8, 1, True)]
    young = scheduler.get("young")
    assert young is not None and young.num_cached == 0  # counted at the first admission
