"""Which replica gets a request, by hand: page size 4, an output token counts as two prompt tokens."""

from jaxserve.scheduler.load import EXPECTED_OUTPUT
from jaxserve.scheduler.routing import Place, Router
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.waiting import OUTPUT_WEIGHT
from tests.scheduler.fake_engine import make_request
from tests.scheduler.test_scheduler import commit, make_scheduler, next_batch

PREFIX = [5] * 16  # four pages


def schedulers(count: int) -> list[Scheduler]:
    return [
        make_scheduler(num_pages=200, prefill_sizes=(64,), prefix_caching=True, max_model_len=400) for _ in range(count)
    ]


def fill_cache(scheduler: Scheduler, prompt: list[int]) -> None:
    """A request of ``prompt`` from its beginning to its end."""
    scheduler.add(make_request("fills", prompt, 1))
    while scheduler.has_unfinished():
        commit(scheduler, next_batch(scheduler))


def test_load_counts_prompts_to_be_read_and_output_to_come():
    (scheduler,) = schedulers(1)
    assert scheduler.load.tokens == 0
    scheduler.add(make_request("waits", [5] * 10, 3))
    assert scheduler.load.tokens == 10 + OUTPUT_WEIGHT * 3
    scheduler.add(make_request("long", [6] * 20, 300))
    assert scheduler.load.tokens == 16 + 20 + OUTPUT_WEIGHT * EXPECTED_OUTPUT
    batch = next_batch(scheduler)
    assert scheduler.load.tokens == 16 + 20 + OUTPUT_WEIGHT * EXPECTED_OUTPUT
    commit(scheduler, batch)
    assert scheduler.load.tokens == OUTPUT_WEIGHT * (3 + EXPECTED_OUTPUT)
    scheduler.forget_computed()  # who is preempted computes again, but has had its first token
    commit(scheduler, next_batch(scheduler))
    assert scheduler.load.tokens == OUTPUT_WEIGHT * (3 + EXPECTED_OUTPUT)
    scheduler.abort("long")
    assert scheduler.load.tokens == OUTPUT_WEIGHT * 3
    commit(scheduler, next_batch(scheduler))
    assert not scheduler.has_unfinished() and scheduler.load.tokens == 0
    scheduler.add(make_request("never runs", [5] * 10, 3))
    scheduler.abort("never runs")
    assert scheduler.load.tokens == 0


def test_load_counts_a_prompt_of_several_completions_once_and_what_is_cached_not_at_all():
    (scheduler,) = schedulers(1)
    fill_cache(scheduler, [*PREFIX, 6])
    scheduler.add_group([make_request(name, [*PREFIX, 7, 7], 1) for name in "abc"], num_cached=16)
    assert scheduler.load.tokens == 2 + 3 * OUTPUT_WEIGHT


def test_the_least_loaded_gets_it():
    first, second, third = replicas = schedulers(3)
    router = Router(replicas)
    first.add(make_request("a", [5] * 9, 4))
    second.add(make_request("b", [5] * 8, 4))
    third.add(make_request("c", [5] * 10, 4))
    assert router.choose(make_request("x", [1, 2, 3], 4)) == Place(1, 0)
    second.add(make_request("d", [1], 1))
    assert router.choose(make_request("x", [1, 2, 3], 4)) == Place(0, 0)


def test_of_equals_the_one_chosen_least_recently():
    router = Router(schedulers(3))
    assert [router.choose(make_request("x", [1], 1)).index for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_a_cached_prefix_draws_up_to_the_work_it_saves():
    """Two pages of three are saved on the second replica: it may have 8 tokens more before it, and no more."""
    first, second = replicas = schedulers(2)
    router = Router(replicas)
    fill_cache(first, [*PREFIX[:8], 6])
    fill_cache(second, [*PREFIX, 6])
    asks = make_request("x", [*PREFIX, 7, 7], 3)
    assert router.choose(asks) == Place(1, 16)
    second.add(make_request("little", [1] * 5, 1))  # 5 + 2
    assert router.choose(asks) == Place(1, 16)
    second.add(make_request("more", [1], 1))  # 3 more are 10
    assert router.choose(asks) == Place(0, 8)
    assert router.choose(make_request("other", [9] * 18, 3)) == Place(0, 0)


def test_a_prefix_counts_only_where_it_is_used():
    """Not of another adapter's, and not where the whole prompt's hidden states are wanted."""
    first, second = replicas = schedulers(2)
    router = Router(replicas)
    fill_cache(second, [*PREFIX, 6])
    first.add(make_request("little", [1], 1))
    second.add(make_request("more", [1], 2))
    assert router.choose(make_request("x", [*PREFIX, 7], 3)) == Place(1, 16)
    assert router.choose(make_request("x", [*PREFIX, 7], 3, prompt_logprobs=0)) == Place(0, 0)


def test_requests_of_one_cached_prefix_spread_when_their_output_outweighs_it():
    """All at once, 16 of 17 tokens cached on the first: there the next is 17 cheaper, and each has 2 * 3 + 1."""
    first, _ = replicas = schedulers(2)
    router = Router(replicas)
    fill_cache(first, [*PREFIX, 6])
    places = []
    for i in range(6):
        request = make_request(f"r{i}", [*PREFIX, 7], 3)
        place = router.choose(request)
        replicas[place.index].add_group([request], place.num_cached)
        places.append(place.index)
    # Loads 0 7 14 21 | 0: the fourth finds 21 + 1 and 0 + 17. Then the second has 17 + 6, and the first is less again.
    assert places == [0, 0, 0, 1, 0, 0]


def test_one_replica_is_not_asked():
    (scheduler,) = schedulers(1)
    fill_cache(scheduler, PREFIX)
    assert Router([scheduler]).choose(make_request("x", [*PREFIX, 7], 3)) == Place(0, 0)
