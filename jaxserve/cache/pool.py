"""The pages of the KV cache as the host sees them: who holds which, and which still hold a known prefix.

A page is a number in ``0..num_pages-1``; what it holds lives on the device. Every page is in exactly one state:

* held: ``refcount > 0``, some running sequences read it (a shared prefix page has several holders);
* cached: nobody holds it, but it is full and in the prefix index: it may be matched again, or evicted;
* free: nobody holds it and nothing is known of its contents.

So ``num_held + num_cached + num_unused == num_pages`` always.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

DIGEST_BYTES = 16  # 128 bits: two different prefixes of 2**40 ever seen collide with probability 2**-49


def extend_digests(digests: list[bytes], token_ids: Sequence[int], page_size: int, root: bytes = b"") -> None:
    """Append to ``digests`` the chained digests of the full pages of ``token_ids`` that it lacks.

    ``digests[i]`` identifies pages ``0..i`` of ``token_ids`` together: ``blake2b(digests[i-1] + page i's ids)``. KV of
    a token depends on every token before it, so equal digests mean equal KV. The caller keeps ``digests`` beside a
    growing token list, and each page is hashed once in its life. ``root`` stands before the first page: what else the
    KV depends on.
    """
    first, last = len(digests), len(token_ids) // page_size
    if first >= last:
        return
    data = np.array(token_ids[first * page_size : last * page_size], np.int32).tobytes()
    parent, size = digests[-1] if digests else root, 4 * page_size
    for start in range(0, len(data), size):
        parent = hashlib.blake2b(parent + data[start : start + size], digest_size=DIGEST_BYTES).digest()
        digests.append(parent)


class PagePool:
    """Free list, reference counts and prefix index of ``num_pages`` pages. Written by the Scheduler only.

    New pages come from the free list first, then from the least recently released cached pages.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True):
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.num_references = 0  # sum of the refcounts
        self.query_tokens = 0  # tokens looked up by allocate_sequence when it succeeded
        self.hit_tokens = 0  # of these, tokens found
        self._refcounts = [0] * num_pages
        self._unused = list(range(num_pages - 1, -1, -1))  # popped from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can hand out: unused ones and evictable cached ones."""
        return len(self._unused) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and that are still in the prefix index."""
        return len(self._cached)

    @property
    def cached_pages(self) -> tuple[int, ...]:
        return tuple(self._cached)

    def refcount(self, page: int) -> int:
        return self._refcounts[page]

    def allocate(self, num_pages: int) -> list[int] | None:
        """``num_pages`` pages with one reference each, or None (and no change) when fewer are free."""
        if num_pages > self.num_free:
            return None
        pages = []
        for _ in range(num_pages):
            if self._unused:
                page = self._unused.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self._refcounts[page] = 1
            pages.append(page)
        self.num_references += num_pages
        return pages

    def acquire(self, pages: Sequence[int]) -> None:
        """One more reference to each of ``pages``, which are held or cached (as ``match_prefix`` returned them)."""
        for page in pages:
            if self._refcounts[page] == 0:
                if page not in self._cached:
                    raise ValueError(f"page {page} is neither held nor cached")
                del self._cached[page]
            self._refcounts[page] += 1
        self.num_references += len(pages)

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each of ``pages``, a sequence's pages in order.

        The last page is released first: a prefix is useless without its beginning, so its end is evicted first.
        """
        for page in reversed(pages):
            if self._refcounts[page] == 0:
                raise ValueError(f"page {page} released more often than acquired")
            self._refcounts[page] -= 1
            if self._refcounts[page] == 0:
                if page in self._digest_of:
                    self._cached[page] = None
                else:
                    self._unused.append(page)
        self.num_references -= len(pages)

    def match_prefix(self, token_ids: Sequence[int], digests: list[bytes], root: bytes = b"") -> list[int]:
        """Pages that hold the longest known prefix of ``token_ids``; takes no reference.

        At most ``(len - 1) // page_size`` pages, so that at least one token is left to compute: its logits are wanted.
        ``digests`` is the caller's memory of the digests of ``token_ids`` after ``root``; it is extended.
        """
        if not self.prefix_caching:
            return []
        extend_digests(digests, token_ids, self.page_size, root)
        pages = []
        for digest in digests[: (len(token_ids) - 1) // self.page_size]:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def allocate_sequence(
        self,
        token_ids: Sequence[int],
        digests: list[bytes],
        num_pages: int,
        keep_free: int = 0,
        match: bool = True,
        root: bytes = b"",
    ) -> tuple[list[int], int] | None:
        """``num_pages`` pages for a sequence that starts with ``token_ids``: matched prefix pages, then new ones.

        Returns the pages, one reference taken to each, and how many of them were matched; or None and no change when
        this would leave fewer than ``keep_free`` pages free. Without ``match`` all pages are new.
        """
        matched = self.match_prefix(token_ids, digests, root) if match else []
        num_new = num_pages - len(matched)
        num_revived = sum(self._refcounts[page] == 0 for page in matched)  # counted as free until acquired
        if num_new + num_revived + keep_free > self.num_free:
            return None
        self.acquire(matched)  # before allocate, which would evict them
        new = self.allocate(num_new)
        assert new is not None
        if self.prefix_caching and match:
            self.query_tokens += len(token_ids)
            self.hit_tokens += len(matched) * self.page_size
        return matched + new, len(matched)

    def register_full_pages(self, pages: Sequence[int], digests: Sequence[bytes]) -> None:
        """Make held, full ``pages`` findable under their ``digests`` (of equal length).

        A page whose content is already known under another page stays unregistered: the first one is kept, and the
        second is freed with its holder.
        """
        if not self.prefix_caching:
            return
        for page, digest in zip(pages, digests, strict=True):
            if digest not in self._page_of and page not in self._digest_of:
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def drop_prefix_cache(self) -> None:
        """Forget every known prefix. Held pages stay held; cached ones become unused."""
        self._unused.extend(self._cached)
        self._cached.clear()
        self._page_of.clear()
        self._digest_of.clear()
