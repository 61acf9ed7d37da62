"""PagePool by hand, then any sequence of its operations against a model that keeps whole token lists as keys."""

import hashlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.cache.pool import PagePool, extend_digests

PS = 4


def allocated(pool: PagePool, num_pages: int) -> list[int]:
    pages = pool.allocate(num_pages)
    assert pages is not None
    return pages


def filled_pool(num_pages: int = 4, tokens: tuple[int, ...] = tuple(range(8))) -> tuple[PagePool, list[int]]:
    """A pool whose pages 0 and 1 are held by one sequence and registered for ``tokens``."""
    pool = PagePool(num_pages, PS)
    digests: list[bytes] = []
    extend_digests(digests, tokens, PS)
    pages = allocated(pool, len(tokens) // PS)
    assert pages == [0, 1]
    pool.register_full_pages(pages, digests)
    return pool, pages


def figures(pool: PagePool) -> tuple[int, int, int]:
    return pool.num_held, pool.num_cached, pool.num_free


def test_digests_are_chained_blake2b_of_full_pages():
    digests: list[bytes] = []
    extend_digests(digests, [1, 2, 3, 4, 5, 6, 7, 8, 9], PS)
    first = hashlib.blake2b(np.array([1, 2, 3, 4], np.int32).tobytes(), digest_size=16).digest()
    second = hashlib.blake2b(first + np.array([5, 6, 7, 8], np.int32).tobytes(), digest_size=16).digest()
    assert digests == [first, second]


def test_digests_grow_with_the_tokens():
    grown: list[bytes] = []
    for length in range(14):
        extend_digests(grown, list(range(length)), PS)
        assert len(grown) == length // PS
    at_once: list[bytes] = []
    extend_digests(at_once, list(range(13)), PS)
    assert grown == at_once


def test_allocate_is_all_or_nothing():
    pool = PagePool(3, PS)
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(2) is None
    assert figures(pool) == (2, 0, 1)
    assert pool.allocate(1) == [2]
    assert pool.allocate(0) == []
    assert figures(pool) == (3, 0, 0)


def test_unregistered_pages_are_forgotten_on_release():
    pool = PagePool(2, PS)
    pages = allocated(pool, 2)
    pool.release(pages)
    assert figures(pool) == (0, 0, 2)


def test_release_more_often_than_acquired():
    pool = PagePool(2, PS)
    pool.allocate(1)
    pool.release([0])
    with pytest.raises(ValueError, match="page 0 released more often"):
        pool.release([0])


def test_a_free_page_cannot_be_acquired():
    with pytest.raises(ValueError, match="page 1 is neither held nor cached"):
        PagePool(2, PS).acquire([1])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (list(range(3)), []),  # not one full page
        (list(range(4)), []),  # the whole prompt is known, but a token must be left to compute
        (list(range(5)), [0]),
        (list(range(8)), [0]),
        (list(range(9)), [0, 1]),
        (list(range(20)), [0, 1]),
        ([0, 1, 2, 3, 9, 9, 9, 9, 9], [0]),
        ([9, 1, 2, 3, 4, 5, 6, 7, 8], []),  # page 1's ids are the same, its history is not
    ],
)
def test_match_prefix(tokens: list[int], expected: list[int]):
    pool, _ = filled_pool()
    assert pool.match_prefix(tokens, []) == expected
    assert figures(pool) == (2, 0, 2)


def test_match_prefix_off():
    pool = PagePool(4, PS, prefix_caching=False)
    pages = allocated(pool, 1)
    digests: list[bytes] = []
    extend_digests(digests, [0, 1, 2, 3], PS)
    pool.register_full_pages(pages, digests)
    assert pool.match_prefix([0, 1, 2, 3, 4], digests) == []
    pool.release(pages)
    assert figures(pool) == (0, 0, 4)


def test_released_prefix_is_found_again_and_shared():
    pool, pages = filled_pool()
    pool.release(pages)
    assert figures(pool) == (0, 2, 4)
    first = pool.allocate_sequence(list(range(9)), [], 3)
    second = pool.allocate_sequence(list(range(6)), [], 2)
    assert first is not None and first == ([0, 1, 2], 2)
    assert second == ([0, 3], 1)
    assert [pool.refcount(page) for page in range(4)] == [2, 1, 1, 1]
    assert (pool.num_references, figures(pool)) == (5, (4, 0, 0))
    assert (pool.query_tokens, pool.hit_tokens) == (9 + 6, 8 + 4)
    pool.release(first[0])
    assert figures(pool) == (2, 1, 2)  # page 1 is cached, page 2 unused, page 0 still held by the second
    assert pool.refcount(0) == 1


def test_free_pages_go_first_then_the_least_recently_released_from_the_end():
    pool, pages = filled_pool(num_pages=5)
    other: list[bytes] = []
    extend_digests(other, [50, 51, 52, 53], PS)
    later = allocated(pool, 1)
    assert later == [2]
    pool.register_full_pages(later, other)
    pool.release(pages)  # pages 1, 0: the end of a prefix before its beginning
    pool.release(later)
    assert [pool.allocate(1) for _ in range(5)] == [[3], [4], [1], [0], [2]]
    assert pool.allocate(1) is None
    assert pool.match_prefix(list(range(9)), []) == []


def test_a_match_saves_a_page_from_eviction():
    pool, pages = filled_pool(num_pages=3)
    pool.release(pages)
    # Three pages are free, but two of them are the prefix itself: four are too many, three just fit.
    assert pool.allocate_sequence(list(range(13)), [], 4) is None
    assert figures(pool) == (0, 2, 3) and pool.query_tokens == 0
    assert pool.allocate_sequence(list(range(12)), [], 3, keep_free=1) is None
    assert pool.allocate_sequence(list(range(12)), [], 3) == ([0, 1, 2], 2)


def test_the_first_page_of_a_content_is_kept():
    pool, pages = filled_pool()
    digests: list[bytes] = []
    extend_digests(digests, list(range(8)), PS)
    twin = allocated(pool, 2)
    assert twin == [2, 3]
    pool.register_full_pages(twin, digests)
    assert pool.match_prefix(list(range(9)), []) == [0, 1]
    pool.release(twin)
    assert figures(pool) == (2, 0, 2)
    pool.release(pages)
    assert figures(pool) == (0, 2, 4)


def test_drop_prefix_cache():
    pool, pages = filled_pool()
    pool.release(pages[1:])
    pool.drop_prefix_cache()
    assert figures(pool) == (1, 0, 3)
    assert pool.match_prefix(list(range(9)), []) == []
    pool.release(pages[:1])
    assert figures(pool) == (0, 0, 4)


class PoolMachine(RuleBasedStateMachine):
    """Holders with token lists; the model keys a page by the whole list of tokens up to its end."""

    NUM_PAGES, PAGE_SIZE = 6, 2

    def __init__(self):
        super().__init__()
        self.pool = PagePool(self.NUM_PAGES, self.PAGE_SIZE)
        self.holders: list[tuple[list[int], list[int], list[bytes]]] = []  # tokens, pages, digests
        self.known: dict[tuple[int, ...], int] = {}  # tokens up to a page's end -> page, as long as nobody took it

    def prefix(self, tokens: list[int], num_pages: int) -> tuple[int, ...]:
        return tuple(tokens[: num_pages * self.PAGE_SIZE])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), keep_free=st.integers(0, 1))
    def start(self, tokens: list[int], keep_free: int):
        num_pages = -(-len(tokens) // self.PAGE_SIZE)
        expected = []
        while (len(expected) + 1) * self.PAGE_SIZE < len(tokens):
            page = self.known.get(self.prefix(tokens, len(expected) + 1))
            if page is None:
                break
            expected.append(page)
        held = {page for _, pages, _ in self.holders for page in pages}
        fits = len(held | set(expected)) + num_pages - len(expected) + keep_free <= self.NUM_PAGES
        digests: list[bytes] = []
        found = self.pool.allocate_sequence(tokens, digests, num_pages, keep_free)
        assert (found is not None) == fits
        if found is None:
            return
        pages, num_matched = found
        assert pages[:num_matched] == expected and len(pages) == num_pages
        new = set(pages[num_matched:])
        assert len(new) == num_pages - num_matched and not new & held
        self.known = {prefix: page for prefix, page in self.known.items() if page not in new}
        self.holders.append((tokens, pages, digests))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def register(self, data: st.DataObject):
        tokens, pages, digests = data.draw(st.sampled_from(self.holders))
        for i in range(len(digests)):
            if pages[i] not in self.known.values():
                self.known.setdefault(self.prefix(tokens, i + 1), pages[i])
        self.pool.register_full_pages(pages[: len(digests)], digests)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def stop(self, data: st.DataObject):
        _, pages, _ = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(pages)

    @rule()
    def drop(self):
        self.pool.drop_prefix_cache()
        self.known.clear()

    @invariant()
    def every_page_is_counted_once(self):
        references = [0] * self.NUM_PAGES
        for _, pages, _ in self.holders:
            for page in pages:
                references[page] += 1
        assert references == [self.pool.refcount(page) for page in range(self.NUM_PAGES)]
        held = {page for page, count in enumerate(references) if count}
        cached = set(self.known.values()) - held
        assert figures(self.pool) == (len(held), len(cached), self.NUM_PAGES - len(held))
        assert self.pool.num_references == sum(references)

    def teardown(self):
        for _, pages, _ in self.holders:
            self.pool.release(pages)
        assert self.pool.num_free == self.NUM_PAGES


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=25, deadline=None, derandomize=True, database=None)
