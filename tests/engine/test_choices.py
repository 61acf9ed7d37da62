"""n completions of one prompt: each as by itself, the prompt's pages shared, all ended together by an abort."""

import pytest

from jaxserve.errors import QueueFullError, RequestError
from jaxserve.request import Request, TokenEvent
from jaxserve.sampling_params import SamplingParams
from tests import tiny

PROMPT = list(range(30, 57))  # six full pages of 4, and three tokens; two chunks
DRAWN = {"temperature": 1.0, "max_tokens": 10, "ignore_eos": True}


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["lookahead0", "lookahead1", "lookahead2"])
def engine(request):
    with tiny.engine(lookahead=request.param) as engine:
        yield engine


def test_choices_are_the_requests_with_the_next_seeds(engine):
    seed = 2**64 - 2  # the third one's is 0
    alone = [engine.generate([PROMPT], SamplingParams(seed=s, **DRAWN))[0] for s in (seed, seed + 1, 0)]
    several = engine.generate([PROMPT, [5, 6]], [SamplingParams(seed=seed, n=3, **DRAWN), SamplingParams(**DRAWN)])
    assert [c.choice for c in several] == [0, 1, 2, 0] and len({c.request_id for c in several}) == 2
    assert [c.token_ids for c in several[:3]] == [c.token_ids for c in alone]
    assert [c.text for c in several[:3]] == [c.text for c in alone]
    assert len({tuple(c.token_ids) for c in alone}) == 3


def test_choices_share_the_prompts_pages():
    with tiny.engine() as engine:
        engine.add_request(engine.make_request(PROMPT, SamplingParams(seed=1, n=4, **DRAWN), request_id="r"))
        events = []
        while engine.stats().num_running < 4:
            events += engine.step()
        assert engine.stats().num_pages_held <= 6 + 4 * 2  # four times seven and more, were they not shared
        while engine.has_unfinished():
            events += engine.step()
        assert engine.stats().num_pages_held == 0
    assert {e.request_id for e in events} == {"r"}
    of_choice = [[e for e in events if e.choice == k] for k in range(4)]
    assert [[e.index for e in es] for es in of_choice] == [list(range(10))] * 4
    ends = [e for e in events if e.finish_reason]
    assert sorted(e.choice for e in ends) == [0, 1, 2, 3]
    assert [e.num_open for e in ends] == [3, 2, 1, 0] and [e.ends_request for e in ends] == [False] * 3 + [True]
    assert ends[-1] is events[-1] and not any(e.ends_request for e in events[:-1])
    cached = [es[-1].usage.cached_tokens for es in of_choice]
    assert cached == [0, 24, 24, 24]


def test_choices_of_different_lengths_and_constraints(engine):
    allowed = tuple(range(2, 12))
    asked = SamplingParams(seed=5, n=4, temperature=1.0, max_tokens=30, allowed_token_ids=(*allowed, tiny.EOS))
    completions = engine.generate([PROMPT], asked)
    assert len({len(c.token_ids) for c in completions}) > 1
    assert all(set(c.token_ids) <= {*allowed, tiny.EOS} for c in completions)
    assert engine.stats().num_running == engine.stats().num_waiting == engine.stats().num_pages_held == 0


def test_a_stream_goes_on_until_the_last_choice(engine):
    events = list(engine.stream(PROMPT, SamplingParams(seed=5, n=3, **DRAWN)))
    assert len(events) == 30 and events[-1].ends_request
    stream = engine.stream(PROMPT, SamplingParams(n=3, **DRAWN))
    next(stream)
    stream.close()
    assert not engine.stats().num_running and not engine.stats().num_waiting


def test_an_abort_ends_all_choices_that_are_left(engine):
    request = engine.make_request(PROMPT, SamplingParams(n=3, **DRAWN), request_id="r")
    engine.add_request(request)
    with pytest.raises(RequestError, match="'r' is already in use"):
        engine.add_request(request)
    events: list[TokenEvent] = []
    while len(events) < 5:
        events += engine.step()
    assert engine.abort("r") and not engine.abort("r")
    while engine.has_unfinished():
        events += engine.step()
    ends = [e for e in events if e.finish_reason]
    assert [(e.finish_reason, e.num_open) for e in ends] == [("abort", 2), ("abort", 1), ("abort", 0)]
    engine.add_request(engine.make_request(PROMPT, SamplingParams(**DRAWN), request_id="r"))  # the id is free again
    with pytest.raises(RequestError, match="'r' is already in use"):
        engine.add_request(request)
    assert engine.abort("r")


def test_more_choices_than_may_wait(monkeypatch):
    with tiny.engine(max_num_waiting=3) as engine:
        with pytest.raises(RequestError, match=r"^n: 4 is more than max_num_waiting=3"):
            engine.make_request(PROMPT, SamplingParams(n=4))
        engine.add_request(engine.make_request(PROMPT, SamplingParams(max_tokens=2)))
        with monkeypatch.context() as patch, pytest.raises(QueueFullError):
            patch.setattr(Request, "choices", lambda self: pytest.fail("made, to be thrown away"))
            engine.add_request(engine.make_request(PROMPT, SamplingParams(n=3, max_tokens=2)))
        while engine.has_unfinished():
            engine.step()
        prompts = [[5, i] for i in range(9)]
        assert len(engine.generate(prompts, SamplingParams(n=3, max_tokens=2, ignore_eos=True))) == 27
