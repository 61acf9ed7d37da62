"""Stop strings over any cut of the text, against ``str.find`` on the whole of it."""

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.stop import StopStrings

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The match that ends first, of several that end there the longest; the text up to or through it."""
    found = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if not found:
        return text, None
    end, start, stop = min(found)
    return text[: end if include else start], stop


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, some of them maybe empty."""
    edges = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@settings(deadline=None)
@given(
    text=st.text("abc", max_size=24),
    stops=STOPS,
    places=st.lists(st.integers(0, 100), max_size=12),
    include=st.booleans(),
)
def test_any_cut_gives_what_find_gives_on_the_whole_text(text, stops, places, include):
    stop_strings = StopStrings(tuple(stops), include=include)
    emitted, seen = "", ""
    for piece in cut(text, places):
        safe, matched = stop_strings.add(piece)
        emitted, seen = emitted + safe, seen + piece
        if matched is not None:
            break
        held = seen[len(emitted) :]
        assert seen.startswith(emitted)
        starts = [k for k in range(len(seen) + 1) if any(s.startswith(seen[k:]) for s in stops)]
        assert held == (seen[min(starts) :] if starts else "")  # no more and no less than may become a stop
    else:
        matched = None
        emitted += stop_strings.flush()
    assert (emitted, matched) == expected(text, stops, include)


@settings(deadline=None)
@given(text=st.text(max_size=40), data=st.data())
def test_unicode_stops_cut_anywhere(text, data):
    inner = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(lambda p: text[min(p) : max(p)])
    stops = [s for s in data.draw(st.lists(inner, max_size=2)) if s]
    stop_strings = StopStrings(stops, include=False)
    emitted, matched = "", None
    for char in text:
        safe, matched = stop_strings.add(char)
        emitted += safe
        if matched:
            break
    assert (emitted + stop_strings.flush(), matched) == expected(text, stops, False)


def test_a_possible_stop_is_held_until_it_is_decided():
    stop_strings = StopStrings(("\n\nUser:",), include=False)
    assert stop_strings.add("Hi\n") == ("Hi", None)
    assert stop_strings.add("\nUs") == ("", None)
    assert stop_strings.add("ing") == ("\n\nUsing", None)
    assert stop_strings.add("\n\nUser") == ("", None)
    assert stop_strings.add(": more") == ("", "\n\nUser:")
    assert stop_strings.add("ignored") == ("", "\n\nUser:")
    assert stop_strings.flush() == ""


def test_the_match_that_ends_first_wins_and_of_equal_ends_the_longest():
    assert StopStrings(("abcd", "bc"), include=True).add("xabcd") == ("xabc", "bc")
    assert StopStrings(("bc", "abc"), include=False).add("xabc") == ("x", "abc")


def test_without_stops_nothing_is_held():
    stop_strings = StopStrings((), include=False)
    assert stop_strings.add("abc") == ("abc", None)
    assert stop_strings.flush() == ""


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="non-empty"):
        StopStrings(("a", ""), include=False)


def test_time_is_linear_in_a_repetitive_text():
    stop_strings = StopStrings(("a" * 5000 + "b",), include=False)
    start = time.process_time()
    emitted = "".join(stop_strings.add("a")[0] for _ in range(20_000))
    assert len(emitted) == 15_000
    assert time.process_time() - start < 5  # quadratic matching takes minutes
