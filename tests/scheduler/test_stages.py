"""Steps in the stages of a pipeline, and the shares of those that decode."""

import pytest

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.scheduler.batch import all_buckets, common_bucket
from jaxserve.scheduler.stages import Shares
from jaxserve.step_io import Bucket
from tests.scheduler.fake_engine import FakeEngine, make_request

CONFIG = SchedulerConfig(
    max_model_len=64, max_num_seqs=8, prefill_sizes=(4, 16, 2048), decode_sizes=(2, 8), num_stages=4
)


def test_the_common_bucket_is_one_that_is_compiled():
    buckets = all_buckets(CONFIG)
    for a in buckets:
        assert common_bucket(CONFIG, [a, a]) == a
        for b in buckets:
            both = common_bucket(CONFIG, [a, b])
            assert both in buckets and both == common_bucket(CONFIG, [b, a])
            assert all(x >= max(y) for x, y in zip(both, zip(a, b)))
            assert both.num_tokens >= max(a.num_tokens, b.num_tokens)
    assert common_bucket(CONFIG, [Bucket(2, 0, 0), Bucket(8, 0, 0)]) == Bucket(8, 0, 0)
    # 8 rows that decode do not fit a step of 4 tokens.
    assert common_bucket(CONFIG, [Bucket(8, 0, 0), Bucket(0, 4, 4)]) == Bucket(8, 16, 4)
    assert common_bucket(CONFIG, [Bucket(0, 4, 4), Bucket(0, 16, 4)]) == Bucket(0, 16, 4)


@pytest.mark.parametrize("num_decoding", range(1, 12))
@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_any_start_is_evened_out(num_decoding: int, num_steps: int):
    """Whoever is ready takes up to its share; a sequence is ready ``num_steps`` after it last entered."""
    shares, ready_at, taken = Shares(num_steps), [0] * num_decoding, []
    for tick in range(6 * num_steps * num_steps):
        ready = [i for i, at in enumerate(ready_at) if at <= tick]
        entering = ready[: shares.next(num_decoding)] if tick else ready  # all at once in the first
        shares.took(len(entering))
        for i in entering:
            ready_at[i] = tick + num_steps
        taken.append(len(entering))
    last = taken[-num_steps:]
    assert sum(last) == num_decoding and max(last) - min(last) <= 1


@pytest.mark.parametrize("num_stages", [2, 4])
def test_in_steady_state_every_stage_has_a_step(num_stages: int):
    config = SchedulerConfig(
        max_model_len=64, max_num_seqs=8, prefill_sizes=(16,), decode_sizes=(2, 8), num_stages=num_stages
    )
    engine = FakeEngine(CacheConfig(num_pages=200, page_size=4), config)
    for i in range(8):
        engine.add(make_request(f"r{i}", [i % 3, i], 50, eos=False))
    engine.drain()
    steady = engine.busy[2 * num_stages : -2 * num_stages]
    assert len(steady) > 40 * num_stages and set(steady) == {num_stages}
    assert all(step is None for step in engine.stages._steps)


def test_fewer_sequences_than_stages_leave_some_idle():
    config = SchedulerConfig(max_model_len=64, max_num_seqs=2, prefill_sizes=(16,), decode_sizes=(2,), num_stages=4)
    engine = FakeEngine(CacheConfig(num_pages=200, page_size=4), config)
    for i in range(2):
        engine.add(make_request(f"r{i}", [i], 40, eos=False))
    engine.drain()
    assert set(engine.busy[8:-8]) == {2}


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="num_stages=0 must be at least 1"):
        SchedulerConfig(max_model_len=64, max_num_seqs=2, prefill_sizes=(16,), decode_sizes=(2,), num_stages=0)
