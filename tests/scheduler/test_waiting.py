"""Fairness among clients: order, shares and waiting times."""

import pytest

from jaxserve.config import CacheConfig, SchedulerConfig
from tests.scheduler.fake_engine import FakeEngine, make_request


def engine(max_num_seqs: int = 1, num_pages: int = 64) -> FakeEngine:
    cache = CacheConfig(num_pages=num_pages, page_size=4, prefix_caching=False)
    config = SchedulerConfig(
        max_model_len=64, max_num_seqs=max_num_seqs, prefill_sizes=(16,), decode_sizes=(max_num_seqs,), lookahead=0,
        max_num_waiting=10_000,
    )  # fmt: skip
    return FakeEngine(cache, config)


class Crowd:
    """Requests of named clients on one engine; ``served`` has the clients in order of admission."""

    def __init__(self, fake: FakeEngine):
        self.fake = fake
        self.num_steps = 0
        self.served: list[str] = []
        self.ended_at: dict[str, int] = {}
        self._seen: set[str] = set()

    def add(self, client: str, num: int, *, prompt_len: int = 4, max_tokens: int = 4, **fields) -> list[str]:
        names = [f"{client}/{len(self.fake.requests) + i}" for i in range(num)]
        for name in names:
            self.fake.add(make_request(name, [1] * prompt_len, max_tokens, eos=False, client=client, **fields))
        return names

    def step(self) -> None:
        self.fake.step()
        self.num_steps += 1
        for sequence in self.fake.scheduler._sequences.values():
            if sequence.admitted_once and sequence.request_id not in self._seen:
                self._seen.add(sequence.request_id)
                self.served.append(sequence.request.client)
        for name in self.fake.reasons:
            self.ended_at.setdefault(name, self.num_steps)

    def run(self, num_admitted: int) -> list[str]:
        while len(self.served) < num_admitted:
            self.step()
        return self.served[:num_admitted]


def test_a_flood_of_one_client_does_not_keep_another_waiting():
    crowd = Crowd(engine())
    crowd.add("flood", 50)
    assert crowd.run(3) == ["flood"] * 3
    crowd.add("guest", 2)
    assert crowd.run(8)[3:] in (
        ["guest", "flood", "guest", "flood", "flood"],
        ["flood", "guest", "flood", "guest", "flood"],
    )


@pytest.mark.parametrize("client", ["flood", "guest"])
def test_waiting_times(client: str):
    """The guest of one slot of four waits a few requests' time. Under the flood's own name it waits for all of it."""
    crowd = Crowd(engine(max_num_seqs=4))
    crowd.add("flood", 200, prompt_len=4, max_tokens=16)
    crowd.run(20)
    waits = []
    for _ in range(5):
        asked = crowd.num_steps
        (name,) = crowd.add(client, 1, max_tokens=4)
        while name not in crowd.ended_at:
            crowd.step()
        waits.append(crowd.ended_at[name] - asked)
    if client == "guest":
        assert max(waits) <= 2 * 16 + 8
    else:
        assert waits[0] > 500


def test_shares_are_of_tokens_not_of_requests():
    crowd = Crowd(engine())
    crowd.add("large", 40, prompt_len=8, max_tokens=16)  # 40 weighted tokens each
    crowd.add("small", 200, prompt_len=2, max_tokens=4)  # 10
    served = crowd.run(100)
    assert served.count("small") == pytest.approx(4 * served.count("large"), abs=4)


def test_priority_comes_before_fairness():
    crowd = Crowd(engine())
    crowd.add("a", 5, priority=0)
    crowd.run(1)
    crowd.add("b", 2, priority=1)
    crowd.add("a", 2, priority=-1)
    assert crowd.run(9)[1:] == ["a"] * 6 + ["b"] * 2


def test_nobody_saves_up():
    crowd = Crowd(engine())
    crowd.add("busy", 100)
    crowd.run(30)
    crowd.add("late", 30)
    served = crowd.run(60)[30:]
    assert abs(served.count("late") - served.count("busy")) <= 2


def test_ever_new_clients_do_not_starve_one_that_had_more_than_its_share():
    crowd = Crowd(engine())
    crowd.add("old", 20)
    crowd.run(10)
    for i in range(200):  # two at a time, so that there is always a new one
        crowd.add(f"new {i}", 1)
        if crowd.fake.scheduler.stats().num_waiting > 11:
            crowd.run(len(crowd.served) + 1)
    assert crowd.served.count("old") > 12


def test_the_preempted_go_first():
    crowd = Crowd(engine(max_num_seqs=2, num_pages=16))
    first = crowd.add("a", 2, prompt_len=20, max_tokens=40)
    crowd.run(2)
    crowd.add("b", 4)
    while not crowd.fake.scheduler.stats().num_preemptions:
        crowd.step()
    head = crowd.fake.scheduler._waiting.head(())
    assert head is not None and head.request_id == first[1]
    crowd.fake.drain()


def test_clients_that_are_gone_are_forgotten():
    crowd = Crowd(engine(max_num_seqs=4))
    for i in range(400):
        if i % 10 == 0:
            crowd.add("always", 1, max_tokens=60)
        crowd.add(f"client {i}", 1, max_tokens=2 + i % 7)
        crowd.run(len(crowd.served) + 1)
    assert len(crowd.fake.scheduler._waiting._clients) < 150
    crowd.fake.drain()
    assert not crowd.fake.scheduler._waiting._clients
