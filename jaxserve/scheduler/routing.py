"""Which of several schedulers, each with pages of its own, gets a request: where it costs least."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.request import Request
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence as Running
from jaxserve.scheduler.waiting import OUTPUT_WEIGHT

# Output tokens, at most, that a sequence is taken to have before it. How many it will have nobody knows: ``max_tokens``
# is a bound that few reach, and often all of the context. Chat answers are of this order.
EXPECTED_OUTPUT = 128


class Place(NamedTuple):
    """Where a request goes.

    Attributes:
        index: of the scheduler.
        num_cached: tokens of the prompt that its prefix cache has.
    """

    index: int
    num_cached: int


class Router:
    """Chooses for each request one of ``schedulers``. Reads them only; on the thread that owns them.

    All is counted in prompt tokens to be computed, an output token as ``OUTPUT_WEIGHT`` of them. A scheduler's load is
    what its sequences, queued and running, have before them (``load``), and a request costs there that load and those
    of its own prompt tokens that the prefix cache does not have. The least cost gets it. So the one that holds the
    longest prefix keeps a request unless its load is more than the least one's by the tokens that this prefix saves:
    waiting behind so many is no faster than computing them elsewhere, where the prefix is then cached, too. With
    ``EXPECTED_OUTPUT`` a prefix of 1024 tokens is worth four sequences of chat.

    Of equals the one that was chosen least recently, so that all fill their caches.
    """

    def __init__(self, schedulers: Sequence[Scheduler]):
        self._schedulers = tuple(schedulers)
        self._by_age = list(range(len(self._schedulers)))  # chosen least recently first

    def choose(self, request: Request) -> Place:
        """The place for ``request``, with all its completions."""
        if len(self._schedulers) == 1:
            return Place(0, 0)
        prompt, digests = request.prompt_token_ids, list[bytes]()
        best, least = Place(-1, 0), 0
        for index in self._by_age:
            scheduler = self._schedulers[index]
            num_cached = 0
            if not request.wants_whole_prompt:
                pages = scheduler.pool.match_prefix(prompt, digests, request.prefix_root)
                num_cached = len(pages) * scheduler.cache.page_size
            cost = load(scheduler) + len(prompt) - num_cached
            if best.index < 0 or cost < least:
                best, least = Place(index, num_cached), cost
        self._by_age.remove(best.index)
        self._by_age.append(best.index)
        return best


def load(scheduler: Scheduler) -> int:
    """What the sequences of ``scheduler`` have before them, in prompt tokens."""
    return sum(map(_work, scheduler.unfinished()))


def _work(sequence: Running) -> int:
    num_left = min(EXPECTED_OUTPUT, sequence.request.max_total_len - sequence.total_len)
    uncomputed = sequence.num_uncomputed
    if not sequence.admitted_once:  # another computes the prompt, or a part of it is in the cache
        uncomputed = 0 if sequence.shares_with is not None else uncomputed - sequence.num_expected
    return uncomputed + OUTPUT_WEIGHT * num_left
