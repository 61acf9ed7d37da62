"""The default model, in float32, against greedy tokens of an independent implementation.

``tests/data/smollm2_greedy.json`` was made by ``scripts/make_reference_tokens.py`` with transformers on torch. It has
the gap between the two best log-probabilities of every step; all are above float32 noise, so every token must agree.
"""

import json
from pathlib import Path

import pytest

from jaxserve import Engine, SamplingParams, StructuredOutputs
from jaxserve.checkpoint.resolve import DEFAULT_MODEL

pytestmark = pytest.mark.timeout(600)  # a busy machine compiles and runs slowly

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text())


@pytest.fixture(scope="module")
def engine():
    options = {"max_model_len": 1024, "max_num_seqs": 4, "prefill_sizes": (64,), "decode_sizes": (4,)}
    with Engine.from_pretrained(DEFAULT_MODEL, dtype="float32", **options) as engine:
        yield engine


def params(prompt: dict, count: int | None = None) -> SamplingParams:
    """For the first ``count`` of its greedy tokens, or all."""
    return SamplingParams(temperature=0, max_tokens=count or len(prompt["new_token_ids"]), ignore_eos=True)


def test_greedy_tokens_from_text(engine):
    prompts = REFERENCE["prompts"]
    completions = engine.generate([p["text"] for p in prompts], [params(p) for p in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.prompt_len == len(prompt["prompt_token_ids"]), prompt["name"]
        assert completion.token_ids == prompt["new_token_ids"], prompt["name"]
    assert engine.stats().recompilations_after_ready == 0
    assert engine.stats().num_pages_held == 0


def test_greedy_tokens_again_from_the_prefix_cache_one_by_one(engine):
    count = 24
    for prompt in REFERENCE["prompts"][:2]:
        (completion,) = engine.generate([prompt["prompt_token_ids"]], params(prompt, count))
        assert completion.token_ids == prompt["new_token_ids"][:count], prompt["name"]
        assert completion.cached_tokens == (len(prompt["prompt_token_ids"]) - 1) // 16 * 16


def test_stream_concatenates_to_the_text(engine):
    prompt = REFERENCE["prompts"][0]
    events = list(engine.stream(prompt["text"], SamplingParams(temperature=0, max_tokens=200)))
    ids = [e.token_id for e in events]
    assert events[-1].finish_reason == "stop" and ids[-1] == engine.tokenizer.eos_token_ids[0]
    assert "".join(e.text for e in events) == engine.tokenizer.decode(ids)


def test_json_of_a_schema_beside_free_text(engine):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    prompt, count = REFERENCE["prompts"][0], 40
    held = SamplingParams(temperature=0, max_tokens=120, structured_outputs=StructuredOutputs(json=schema))
    text = "Alice is 31 years old. As JSON: "
    free, structured = engine.generate([prompt["text"], text], [params(prompt, count), held])
    assert free.token_ids == prompt["new_token_ids"][:count]
    assert structured.finish_reason == "stop" and set(json.loads(structured.text)) == {"name", "age"}


def test_prompt_log_probabilities_find_the_greedy_tokens(engine):
    prompt = REFERENCE["prompts"][1]
    ids = [*prompt["prompt_token_ids"], *prompt["new_token_ids"]]
    (scored,) = engine.generate([ids], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    for entry in scored.prompt_logprobs[len(prompt["prompt_token_ids"]) :]:
        assert entry.top == ((entry.token_id, entry.logprob),)


def test_greedy_tokens_of_the_4_bit_weights_as_they_are():
    prompt, count = REFERENCE["prompts"][0], 40
    options = {"max_model_len": 128, "max_num_seqs": 1, "prefill_sizes": (64,)}
    with Engine.from_pretrained(DEFAULT_MODEL, quantization="gguf", dtype="float32", **options) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1, prompt_logprobs=0)
        (completion,) = engine.generate([prompt["prompt_token_ids"]], sampling)
    assert completion.prompt_logprobs is not None and len(completion.prompt_logprobs) == completion.prompt_len
    assert completion.token_ids == prompt["new_token_ids"][:count]
