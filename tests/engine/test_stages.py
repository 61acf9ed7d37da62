"""Running sequences shared out over the stages of a mesh: no stage is idle, and every token is the same."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from jaxserve.engine.engine import Engine
from jaxserve.engine.step_times import StepTimes
from jaxserve.sampling_params import SamplingParams, StructuredOutputs
from tests import tiny
from tests.oracle import oracle_greedy

STAGES = 4
NUM_TOKENS = 20


def greedy(num_tokens: int = NUM_TOKENS, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **fields)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Two sequences a stage; pages for a few of them only."""
    options: dict[str, Any] = {"max_num_seqs": 8, "decode_sizes": (8,), "prefill_sizes": (16,), "num_pages": 48}
    with tiny.engine(mesh=f"stage={STAGES}", max_prefill_rows=2, **options) as engine:
        yield engine


def expected(prompts: list[list[int]], num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    return [oracle_greedy(tiny.CONFIG, tiny.params(), p, num_tokens) for p in prompts]


def drive(engine: Engine) -> tuple[dict[str, list[int]], list[StepTimes]]:
    """Every request's tokens, and what each tick was."""
    said: dict[str, list[int]] = {}
    times: list[StepTimes] = []
    while engine.has_unfinished():
        for event in engine.step(on_times=times.append):
            if event.token_id is not None:
                said.setdefault(event.request_id, []).append(event.token_id)
    return said, times


def test_no_stage_is_idle_while_sequences_decode(engine: Engine):
    prompts = tiny.prompts(8, seed=1, longest=6)
    for i, prompt in enumerate(prompts):
        engine.add_request(engine.make_request(prompt, greedy(), request_id=str(i)))
    said, times = drive(engine)
    assert [said[str(i)] for i in range(8)] == expected(prompts)
    ticks = [t.tick for t in times if t.tick is not None]
    whole = [t for t in times if t.tick and t.tick.num_rows == 8 and not t.tick.bucket.prefill_tokens]
    # All 8 are in the stages at once, 2 in each.
    assert len(whole) >= 2 * STAGES and {t.tick.num_busy for t in whole if t.tick} == {STAGES}
    assert {len(t.batch.rows) for t in whole[STAGES:] if t.batch} == {2}
    steady = ticks[STAGES : -2 * STAGES]
    assert sum(STAGES - tick.num_busy for tick in steady) <= STAGES
    # A sequence has a token every ST ticks, no later.
    assert len(ticks) <= STAGES * (NUM_TOKENS + 4)


def test_few_pages_and_shared_prefixes(engine: Engine):
    prompts = tiny.prompts(8, seed=2)
    before = engine.stats()
    first = engine.generate(prompts, greedy())
    again = engine.generate(prompts[:2], greedy())
    assert [c.token_ids for c in first] == expected(prompts)
    assert [c.token_ids for c in again] == expected(prompts[:2])
    after = engine.stats()
    assert after.num_preemptions > before.num_preemptions and after.prefix_cache_hits > before.prefix_cache_hits
    assert after.num_pages_held == 0 and after.recompilations_after_ready == 0


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_who_is_aborted_in_the_stages_disturbs_nobody(penalty: float, engine: Engine):
    """Their pages and slots go to others while their steps are on the way: the sampler counts what they still sample
    in the slot's penalties, and is told of its new owner afterwards."""
    # Two tokens that take turns, as often as each was counted; one counted for another sequence changes who is next.
    params = greedy(frequency_penalty=penalty, logit_bias={5: 60.0, 6: 60.0} if penalty else None)
    prompts = tiny.prompts(12, seed=3, longest=20)
    for i, prompt in enumerate(prompts):
        engine.add_request(engine.make_request(prompt, params, request_id=str(i)))
    said: dict[str, list[int]] = {str(i): [] for i in range(12)}
    aborted = {7: "0", 9: "3", 10: "1", 14: "4"}  # after so many ticks
    for number in range(1, 1000):
        for event in engine.step():
            if event.token_id is not None:
                said[event.request_id].append(event.token_id)
        if number in aborted:
            assert engine.abort(aborted[number])
        if not engine.has_unfinished():
            break
    alone = [engine.generate(prompt, params)[0].token_ids for prompt in prompts]
    assert (alone == expected(prompts)) == (penalty == 0)
    for i, want in enumerate(alone):
        got = said[str(i)]
        assert got == (want[: len(got)] if str(i) in aborted.values() else want)
    assert engine.stats().num_pages_held == 0


def test_constraints_and_structured_output_beside_others(engine: Engine):
    """A slot's penalties are told to the sampler when their step leaves, not while another's is still on its way."""
    prompts = tiny.prompts(10, seed=4, longest=12)
    params = [
        greedy(12, presence_penalty=1.5, frequency_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=40, structured_outputs=StructuredOutputs(regex="[a-f]{5,9}!")),
        greedy(7),
        SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=9, ignore_eos=True, logprobs=2),
        greedy(5, logit_bias={7: 3.0, 8: -100.0}),
    ] * 2
    alone = [engine.generate(p, s)[0] for p, s in zip(prompts, params)]
    together = engine.generate(prompts, params)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for got, want in zip(together[3].logprobs or (), alone[3].logprobs or (), strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
    for completion in (together[1], together[6]):
        assert re.fullmatch("[a-f]{5,9}!", completion.text)


def test_one_step_at_a_time_is_the_textbook_s_bubble():
    with tiny.engine(mesh=f"stage={STAGES}", lookahead=0, samplings=("greedy",), num_pages=200) as engine:
        prompts = tiny.prompts(4, seed=5, longest=6)
        assert [c.token_ids for c in engine.generate(prompts, greedy(8))] == expected(prompts, 8)
        stages = engine.loop.stages
        assert stages.num_idle == (STAGES - 1) * stages.num_ticks > 0
