"""A cache of int8 and fp8 through the engine, in chunks and with shared prefixes: near the plain one, on a mesh too."""

import numpy as np
import pytest

from jaxserve import SamplingParams
from tests import tiny
from tests.oracle import oracle_logits

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)


def generated(prompts, **options):
    sizes = {
        "prefill_sizes": (16,),
        "max_prefill_rows": 2,
        "max_num_seqs": 2,
        "decode_sizes": (2,),
        "samplings": ("any",),
    }
    with tiny.engine(**sizes, **options) as engine:
        completions = engine.generate(prompts, PARAMS)
        again = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        assert engine.stats().prefix_cache_hits > 0 and engine.stats().recompilations_after_ready == 0
    tokens = [c.token_ids for c in completions]
    assert [c.token_ids for c in again] == tokens  # from the pages of the first time
    logprobs = [[e.logprob for e in c.prompt_logprobs or () if e is not None] for c in completions]
    return np.concatenate(logprobs)


@pytest.mark.parametrize("dtype, mesh, most", [("int8", "stage=2,tensor=2", 0.02), ("fp8", None, 0.1)])
def test_it_is_near_the_plain_cache(dtype, mesh, most):
    prompts = tiny.prompts(3, seed=2, longest=40)
    logits = [oracle_logits(tiny.CONFIG, tiny.params(), p)[:-1] for p in prompts]
    chosen = [(x - np.log(np.exp(x).sum(-1, keepdims=True)))[np.arange(len(x)), p[1:]] for x, p in zip(logits, prompts)]
    logprobs = generated(prompts, kv_cache_dtype=dtype, mesh=mesh)
    assert 1e-4 < np.abs(logprobs - np.concatenate(chosen)).max() < most
