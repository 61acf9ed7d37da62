"""Any sequence of adds, steps, aborts and expiries, under any limits: a solo run's tokens, and nothing leaks."""

import random
from typing import Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.errors import QueueFullError
from tests.scheduler.fake_engine import VOCAB_SIZE, FakeEngine, make_request

MAX_MODEL_LEN = 24
MAX_PROMPT_LEN = 9

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=2, unique=True).map(sorted).map(tuple)


def shared_prompt(base: int, length: int, tail: list[int]) -> list[int]:
    """Few prompts with long common beginnings, so that pages are shared, computed twice, evicted and matched again."""
    return [(base + i) % VOCAB_SIZE for i in range(length)] + tail


requests = st.fixed_dictionaries(
    {
        "prompt": st.builds(
            shared_prompt,
            st.integers(0, 1),
            st.integers(1, MAX_PROMPT_LEN - 1),
            st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=1),
        ),
        "max_tokens": st.integers(1, MAX_MODEL_LEN - MAX_PROMPT_LEN),
        "eos": st.sampled_from([False, False, True]),
        "stop_token_ids": st.sampled_from([(), (), (3,)]),
        "hold_back": st.booleans(),
        "num_choices": st.sampled_from([1, 1, 1, 2, 3]),
        "seed": st.sampled_from([0, 1, 2**64 - 1]),
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
        "client": st.sampled_from(["", "", "a", "b"]),
        "arrival": st.sampled_from([0.0, 1.0, 2.0]),
        "deadline": st.sampled_from([None, None, None, 1.0, 2.0]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """The engine's loop on the fake device; FakeEngine holds the checks."""

    @initialize(
        page_size=st.integers(1, 4),
        spare_pages=st.integers(0, 4),
        max_num_seqs=st.integers(1, 5),
        small_decode=st.booleans(),
        prefill_sizes=sizes,
        max_prefill_rows=st.integers(1, 3),
        lookahead=st.sampled_from([1, 2, 0]),
        num_stages=st.sampled_from([1, 2, 4]),
        prefix_caching=st.booleans(),
        batching=st.sampled_from(["continuous", "continuous", "continuous", "static"]),
        allocation=st.sampled_from(["paged", "paged", "paged", "static"]),
    )
    def start(self, page_size, spare_pages, max_num_seqs, small_decode, prefill_sizes, max_prefill_rows, lookahead,
              num_stages, prefix_caching, batching, allocation):  # fmt: skip
        num_pages = -(-MAX_MODEL_LEN // page_size) + spare_pages  # hardly more than one sequence may need
        cache = CacheConfig(
            num_pages=num_pages, page_size=page_size, prefix_caching=prefix_caching, allocation=allocation
        )
        config = SchedulerConfig(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            prefill_sizes=tuple(sorted({*prefill_sizes, max(*prefill_sizes, max_num_seqs + 1)})),
            decode_sizes=(1, max_num_seqs) if small_decode and max_num_seqs > 1 else (max_num_seqs,),
            max_prefill_rows=max_prefill_rows,
            max_num_waiting=6,
            lookahead=lookahead,
            num_stages=num_stages,
            batching=batching,
        )
        self.engine = FakeEngine(cache, config)

    @rule(several=st.lists(requests, min_size=1, max_size=4))
    def add(self, several):
        for values in several:
            min_tokens = values["max_tokens"] // 2 * values["hold_back"]
            first, num = len(self.engine.requests), values["num_choices"]
            values = {name: value for name, value in values.items() if name not in ("hold_back", "num_choices", "seed")}
            requests = [make_request(f"r{first + i}", min_tokens=min_tokens, seed=i, **values) for i in range(num)]
            full = self.engine.scheduler.stats().num_waiting + num > self.engine.config.max_num_waiting
            try:
                self.engine.add(*requests)
                assert not full
            except QueueFullError:
                assert full

    @rule(num_steps=st.integers(1, 12))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.engine.step()
            self.engine.check_state()

    @precondition(lambda self: self.engine.requests)
    @rule(
        what=st.sampled_from(["abort", "stop string", "expire", "drop the prefix cache", "forget"]),
        which=st.integers(0, 2**16),
        now=st.sampled_from([0.5, 1.0, 1.5]),
    )
    def disturb(self, what, which, now):
        if what == "expire":
            self.engine.expire(now)
        elif what == "drop the prefix cache":
            self.engine.scheduler.pool.drop_prefix_cache()
        elif what == "forget":
            self.engine.scheduler.forget_computed()
            assert self.engine.scheduler.pool.num_held == self.engine.scheduler.pool.num_cached == 0
        else:
            request_id = f"r{which % len(self.engine.requests)}"
            unfinished = request_id not in self.engine.reasons
            assert self.engine.end(request_id, what) == unfinished

    @invariant()
    def state_is_sound(self):
        self.engine.check_state()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=120,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("lookahead, num_stages", [(0, 1), (1, 1), (2, 1), (1, 3), (0, 3)])
def test_a_crowd_on_few_pages(lookahead: Literal[0, 1, 2], num_stages: int, prefix_caching: bool, page_size: int):
    """64 requests, some aborted, where 8 run at once on the pages of two: all others get a solo run's tokens."""
    generator = random.Random(page_size)
    cache = CacheConfig(num_pages=48 // page_size, page_size=page_size, prefix_caching=prefix_caching)
    config = SchedulerConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=8,
        prefill_sizes=(2, 9),
        decode_sizes=(2, 8),
        lookahead=lookahead,
        num_stages=num_stages,
    )
    engine = FakeEngine(cache, config)
    for i in range(64):
        prompt = shared_prompt(i % 2, generator.randrange(1, 8), [generator.randrange(VOCAB_SIZE)])
        engine.add(make_request(f"r{i}", prompt, generator.randrange(8, 15), eos=i % 4 == 0, arrival=float(i)))
        for _ in range(generator.randrange(3)):
            engine.step()
            engine.check_state()
        if i % 8 == 0:
            engine.end(f"r{generator.randrange(i + 1)}", "abort")
    engine.drain()
    stats = engine.scheduler.stats()
    # Else this test would show nothing.
    assert stats.num_preemptions >= 10
    assert (engine.num_preempted_in_flight > 0) == bool(lookahead)
    assert (stats.prefix_cache_hits > 100) == prefix_caching
