"""Adapters as `peft` saved them, and the logits that it computed: of separate, fused and transposed modules."""

import pytest

from jaxserve import SamplingParams
from tests.families.golden import check_logits, engine, sampled_logits
from tests.lora import golden


@pytest.mark.parametrize("name", golden.NAMES)
def test_logits_and_tokens_are_those_of_peft(name):
    adapter = golden.load(name)
    with engine(adapter, lora_modules={"it": adapter.adapter}, max_loras=2, max_lora_rank=4) as served:
        with sampled_logits(served) as seen:
            (completion,) = served.generate(
                [adapter.prompt],
                SamplingParams(temperature=0, max_tokens=len(adapter.tokens), ignore_eos=True),
                lora="it",
            )
        assert served.stats().recompilations_after_ready == 0
    assert completion.token_ids == adapter.tokens
    check_logits(adapter, seen, adapter.sampled_lengths)
