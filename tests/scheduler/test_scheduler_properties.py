"""Any sequence of adds, steps, aborts and expiries, under any limits: a solo run's tokens, and nothing leaks."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.request import QueueFullError
from tests.scheduler.fake_engine import VOCAB_SIZE, FakeEngine, make_request

MAX_MODEL_LEN = 24

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=2, unique=True).map(sorted).map(tuple)
# Few prompts with long common beginnings, so that pages are shared, registered twice, evicted and matched again.
shared_prompt = st.builds(
    lambda base, length, tail: [(base + i) % VOCAB_SIZE for i in range(length)] + tail,
    st.integers(0, 1),
    st.integers(0, 10),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
).filter(bool)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.integers(1, 4),
        spare_pages=st.integers(0, 8),
        max_num_seqs=st.integers(1, 5),
        small_decode=st.booleans(),
        prefill_sizes=sizes,
        max_prefill_rows=st.integers(1, 3),
        lookahead=st.sampled_from([0, 1]),
        prefix_caching=st.booleans(),
        batching=st.sampled_from(["continuous", "continuous", "static"]),
        allocation=st.sampled_from(["paged", "paged", "static"]),
    )
    def start(self, page_size, spare_pages, max_num_seqs, small_decode, prefill_sizes, max_prefill_rows, lookahead,
              prefix_caching, batching, allocation):  # fmt: skip
        num_pages = -(-MAX_MODEL_LEN // page_size) + spare_pages  # hardly more than one sequence may need
        cache = CacheConfig(
            num_pages=num_pages, page_size=page_size, prefix_caching=prefix_caching, allocation=allocation
        )
        config = SchedulerConfig(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            prefill_sizes=prefill_sizes,
            decode_sizes=(1, max_num_seqs) if small_decode and max_num_seqs > 1 else (max_num_seqs,),
            max_prefill_rows=max_prefill_rows,
            max_num_waiting=6,
            lookahead=lookahead,
            batching=batching,
        )
        self.engine = FakeEngine(cache, config)
        self.num_added = 0

    @rule(
        prompt=shared_prompt,
        max_tokens=st.integers(1, 12),
        eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (3,)]),
        hold_back=st.booleans(),
        seed=st.sampled_from([0, 1, 2**64 - 1]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        arrival=st.integers(0, 3),
        deadline=st.sampled_from([None, None, 1.0, 2.0]),
    )
    def add(self, prompt, max_tokens, eos, stop_token_ids, hold_back, seed, priority, arrival, deadline):
        request = make_request(
            f"r{self.num_added}",
            prompt,
            max_tokens,
            eos=eos,
            stop_token_ids=stop_token_ids,
            min_tokens=max_tokens // 2 if hold_back else 0,
            seed=seed,
            priority=priority,
            arrival=float(arrival),
            deadline=deadline,
        )
        full = self.engine.scheduler.stats().num_waiting >= self.engine.config.max_num_waiting
        try:
            self.engine.add(request)
            assert not full
            self.num_added += 1
        except QueueFullError:
            assert full

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.engine.step()
            self.engine.check_state()

    @precondition(lambda self: self.num_added)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop string"]))
    def end(self, data, reason):
        request_id = f"r{data.draw(st.integers(0, self.num_added - 1))}"
        unfinished = request_id not in self.engine.reasons
        assert self.engine.end(request_id, reason) == unfinished

    @rule(now=st.sampled_from([0.5, 1.0, 1.5]))
    def expire(self, now):
        self.engine.expire(now)

    @rule()
    def drop_prefix_cache(self):
        self.engine.scheduler.pool.drop_prefix_cache()

    @invariant()
    def state_is_sound(self):
        if hasattr(self, "engine"):
            self.engine.check_state()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain(2000)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
