"""Who is admitted next: by priority, and among requests of one priority fairly by client."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from jaxserve.scheduler.sequence import Sequence

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # of a computed token: an output token costs a step of its row
SWEEP_FROM = 64  # clients

by_order = attrgetter("order")


@dataclass(slots=True)
class _Client:
    """What one client has got and wants.

    Attributes:
        served: weighted tokens computed for it, and what it was lifted by.
        queue: never admitted, best first.
    """

    served: float = 0.0
    num_unfinished: int = 0
    queue: list[Sequence] = field(default_factory=list)


class WaitingQueue:
    """Sequences that wait for admission. Belongs to the Scheduler.

    Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): the next one is the
    best of the client that has been served least, in weighted tokens, so that a client with a thousand requests gets
    no more than one with a few. A client that comes (back) to the queue starts no lower than the fair share, which
    grows with what is served divided among those who have requests: nobody saves up, and, since it outgrows every
    counter that stands still, nobody waits for ever. Tokens from the prefix cache and those that a preemption has
    computed again count for nothing.

    Preempted sequences come before all others of their priority, in their own order: they have had their turn, and the
    scheduler's promise that everything finishes rests on it. One client alone is served in order.
    """

    def __init__(self):
        self._preempted: list[Sequence] = []  # best first
        self._clients: dict[str, _Client] = {}
        self._num_queued = 0
        self._num_active = 0  # clients with unfinished requests
        self._fair_share = 0.0
        self._sweep_at = SWEEP_FROM

    def __len__(self) -> int:
        return len(self._preempted) + self._num_queued

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for client in self._clients.values():
            yield from client.queue

    def add(self, sequence: Sequence) -> None:
        """A new sequence."""
        name = sequence.request.client
        client = self._clients.get(name)
        if client is None:
            self._sweep()
            client = self._clients[name] = _Client()
        if not client.queue:
            client.served = max(client.served, self._fair_share)
        self._num_active += not client.num_unfinished
        client.num_unfinished += 1
        insort(client.queue, sequence, key=by_order)
        self._num_queued += 1

    def put_back(self, sequence: Sequence) -> None:
        """One that was preempted."""
        insort(self._preempted, sequence, key=by_order)

    def head(self, running: Iterable[Sequence]) -> Sequence | None:
        """Who is next; None if nobody waits.

        Args:
            running: the running sequences: what they have got since counts.
        """
        waiting = [client for client in self._clients.values() if client.queue] if self._num_queued else []
        if len(waiting) > 1:
            for sequence in running:
                self._settle(sequence)
        best = min((_turn(client) for client in waiting), default=None)
        if self._preempted and (best is None or self._preempted[0].request.priority <= best[0]):
            return self._preempted[0]
        return None if best is None else best[3]

    def admit(self, sequence: Sequence, num_prompt_tokens: int) -> None:
        """``sequence`` runs now. ``num_prompt_tokens``: of its prompt, to be computed for the first time."""
        self._take(sequence)
        self._charge(self._clients[sequence.request.client], PROMPT_WEIGHT * num_prompt_tokens)

    def end(self, sequence: Sequence) -> None:
        """``sequence`` ends now, running or waiting."""
        if sequence.status == "waiting":
            self._take(sequence)
        self._settle(sequence)
        client = self._clients[sequence.request.client]
        client.num_unfinished -= 1
        if client.num_unfinished == 0:
            self._num_active -= 1
            if self._num_active == 0:  # nobody is left to be fair to
                self._clients.clear()
                self._fair_share, self._sweep_at = 0.0, SWEEP_FROM

    def _take(self, sequence: Sequence) -> None:
        if sequence.admitted_once:
            del self._preempted[bisect_left(self._preempted, sequence.order, key=by_order)]
        else:
            queue = self._clients[sequence.request.client].queue
            del queue[bisect_left(queue, sequence.order, key=by_order)]
            self._num_queued -= 1

    def _settle(self, sequence: Sequence) -> None:
        """Charges what ``sequence`` has put out since the last time."""
        num_tokens = sequence.num_output_tokens - sequence.num_charged
        if num_tokens:
            sequence.num_charged += num_tokens
            self._charge(self._clients[sequence.request.client], OUTPUT_WEIGHT * num_tokens)

    def _charge(self, client: _Client, cost: float) -> None:
        client.served += cost
        self._fair_share += cost / self._num_active

    def _sweep(self) -> None:
        """Forgets clients that are gone and would begin at the fair share again."""
        if len(self._clients) < self._sweep_at:
            return
        self._clients = {
            name: client
            for name, client in self._clients.items()
            if client.num_unfinished or client.served > self._fair_share
        }
        self._sweep_at = max(SWEEP_FROM, 2 * len(self._clients))


def _turn(client: _Client) -> tuple[int, float, tuple[int, float, int], Sequence]:
    """Less is earlier; orders differ, so that sequences are never compared."""
    first = client.queue[0]
    return first.request.priority, client.served, first.order, first
