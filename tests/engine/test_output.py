"""What a reader gets of a SentencePiece model's tokens: the text that continues the prompt."""

from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine.output import RequestOutput
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.scheduler import CommittedToken
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step_io import StepOutputs
from jaxserve.text.sentencepiece_model import read_sentencepiece_model
from jaxserve.text.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[1] / "data" / "spm_bpe.model"


@pytest.mark.parametrize(("prompt", "expected"), [("the the", " the the"), ("", "the the")])
def test_prompt_and_completion_together_are_the_text_of_their_tokens(prompt, expected):
    model = read_sentencepiece_model(MODEL)
    tokenizer = Tokenizer.from_backend(model.backend, eos_token_ids=(2,), bos_token_id=1, prefix_ids=(1,))
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(tokenizer.encode(prompt)),
        params=SamplingParams(max_tokens=2),
        max_total_len=99,
        stop_token_ids=(2,),
        seed=0,
    )
    sequence = Sequence(request, 0)
    output = RequestOutput(sequence, tokenizer)
    the = tokenizer.encode("the", add_special_tokens=False)[0]
    nothing = StepOutputs(*(np.zeros((1, 1)) for _ in StepOutputs._fields))
    events = [
        output.on_token(CommittedToken(sequence, 0, the, i, reason, None), nothing)
        for i, reason in enumerate((None, "length"))
    ]
    text = "".join(event.text for event in events)
    assert text == expected
    assert prompt + text == tokenizer.decode([*request.prompt_token_ids, the, the])
