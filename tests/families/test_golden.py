"""Every family through the engine, with chunks of prompts, pages and greedy decoding, against transformers' logits."""

import pytest

from jaxserve import SamplingParams
from tests.families import golden as goldens

# Where a chunk of 8 or a page of 4 ends, and where a window of 8 begins to slide.
LENGTHS = (1, 4, 7, 8, 9, 16, 21, 30)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


@pytest.fixture(scope="module", params=goldens.NAMES)
def golden_and_engine(request):
    golden = goldens.load(request.param)
    with goldens.engine(golden, prefix_caching=False) as engine:
        yield golden, engine


def test_logits_and_tokens(golden_and_engine):
    golden, engine = golden_and_engine
    with goldens.sampled_logits(engine) as seen:
        (completion,) = engine.generate([golden.prompt], greedy(len(golden.tokens)))
    goldens.check_logits(golden, seen, golden.sampled_lengths)
    assert completion.token_ids == golden.tokens
    assert engine.stats().recompilations_after_ready == 0


def test_logits_after_parts_of_the_prompt(golden_and_engine):
    golden, engine = golden_and_engine
    with goldens.sampled_logits(engine) as seen:
        engine.generate([golden.prompt[:length] for length in LENGTHS], greedy(1))
    goldens.check_logits(golden, seen, LENGTHS)


@pytest.mark.parametrize("name", goldens.NAMES)
def test_tokens_on_a_mesh(name):
    golden = goldens.load(name)
    with goldens.engine(golden, mesh="stage=2,tensor=2") as engine, goldens.sampled_logits(engine) as seen:
        (completion,) = engine.generate([golden.prompt], greedy(len(golden.tokens)))
    goldens.check_logits(golden, seen, golden.sampled_lengths)
    assert completion.token_ids == golden.tokens
