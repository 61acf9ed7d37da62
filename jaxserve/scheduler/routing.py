"""Which of several schedulers, each with pages of its own, gets a request: where it costs least."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.request import Request
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.waiting import PROMPT_WEIGHT


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

    A request costs there what the scheduler has before it (``load.Load``), in prompt tokens, and those of its own
    prompt tokens that the prefix cache does not have. The least cost gets it. So the one that holds the longest prefix
    keeps a request unless its load is more than the least one's by the tokens that this prefix saves: waiting behind so
    many is no faster than computing them elsewhere, where the prefix is then cached, too. With ``EXPECTED_OUTPUT`` a
    prefix of 1024 tokens is worth four sequences of chat.

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
            cost = scheduler.load.tokens + PROMPT_WEIGHT * (len(prompt) - num_cached)
            if best.index < 0 or cost < least:
                best, least = Place(index, num_cached), cost
        self._by_age.remove(best.index)
        self._by_age.append(best.index)
        return best
