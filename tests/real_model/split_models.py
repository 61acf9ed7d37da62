"""Gemma 3 and Qwen2.5, in float32, against greedy tokens of transformers.

The references were made by ``scripts/make_reference_tokens.py``; every gap between the two best log-probabilities is
above float32 noise. ``python scripts/fetch_models.py NAME`` gets a model; without it its tests are skipped.
"""

import json
from pathlib import Path

import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.checkpoint import GGUFCheckpoint
from jaxserve.checkpoint.packaged import SPLIT_MODELS, models_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a busy machine compiles and runs slowly

DATA = Path(__file__).parents[1] / "data"
REFERENCES = {
    "gemma3-270m": "gemma3_270m_greedy.json",
    "qwen2.5-coder-0.5b-instruct": "qwen25_coder_05b_greedy.json",
}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_reference_is_of_this_file(name):
    reference = json.loads((DATA / REFERENCES[name]).read_text())
    assert (reference["model_file"], reference["model_sha256"]) == (
        SPLIT_MODELS[name].file_name,
        SPLIT_MODELS[name].sha256,
    )
    assert min(min(p["gaps"]) for p in reference["prompts"]) > 1e-3


def model_file(name: str) -> Path:
    path = models_folder() / SPLIT_MODELS[name].file_name
    if not path.is_file():
        pytest.skip(f"the model is not here: python scripts/fetch_models.py {name}")
    return path


@pytest.mark.parametrize("name", REFERENCES)
def test_prompts_become_the_same_ids(name):
    with GGUFCheckpoint(model_file(name)) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    for prompt in json.loads((DATA / REFERENCES[name]).read_text())["prompts"]:
        if prompt["messages"] is None:
            assert tokenizer.encode(prompt["text"]) == prompt["prompt_token_ids"], prompt["name"]
        else:
            assert tokenizer.encode_chat(prompt["messages"]) == prompt["prompt_token_ids"], prompt["name"]


@pytest.mark.parametrize("name", REFERENCES)
def test_greedy_tokens(name):
    path = model_file(name)
    prompts = json.loads((DATA / REFERENCES[name]).read_text())["prompts"]
    params = [SamplingParams(temperature=0, max_tokens=len(p["new_token_ids"]), ignore_eos=True) for p in prompts]
    options = {"max_model_len": 1024, "max_num_seqs": 8, "prefill_sizes": (128,)}
    with (
        GGUFCheckpoint(path) as checkpoint,
        Engine.from_params(checkpoint.config, checkpoint, dtype="float32", **options) as engine,
    ):
        completions = engine.generate([p["prompt_token_ids"] for p in prompts], params)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == prompt["new_token_ids"], prompt["name"]
