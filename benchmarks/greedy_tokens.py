"""Greedy tokens of a small random model: by the kernels chosen for a device, by the references, and on a CPU.

    python -m benchmarks.greedy_tokens

prints those of this machine's default device in float32 as JSON: their ids, and how much likelier each was than the
second best.
"""

import json
from contextlib import ExitStack
from typing import Any, Literal
from unittest import mock

import jax.numpy as jnp

from jaxserve.config import ModelConfig
from jaxserve.engine.engine import Engine
from jaxserve.execution.dummy import dummy_params
from jaxserve.parallel.mesh import make_mesh, parse_mesh
from jaxserve.sampling_params import SamplingParams
from pallas_kernels import dispatch

TINY = ModelConfig(  # shapes that the kernels take
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    max_position_embeddings=8192,
)
PROMPT_LENS = (1, 15, 16, 17, 64, 129, 300, 777)
NUM_TOKENS = 24


def completions(
    mesh_text: str = "",
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    config: ModelConfig = TINY,
    logprobs: int = 0,
) -> list[Any]:
    """``NUM_TOKENS`` greedy tokens behind each of the prompts, with their log-probabilities and those of so many of the
    best."""
    prompts = [[(7 * i + 13 * n) % config.vocab_size for i in range(n)] for n in PROMPT_LENS]
    asked = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=logprobs)
    mesh = make_mesh(parse_mesh(mesh_text))
    with Engine(
        config, dummy_params(config, mesh, jnp.dtype(dtype)), mesh=mesh, dtype=dtype, max_model_len=1024,
        num_pages=1024, max_num_seqs=8, decode_sizes=(8,), prefill_sizes=(512,), prefix_caching=False,
        samplings=("any" if logprobs else "greedy",),
    ) as engine:  # fmt: skip
        return engine.generate(prompts, asked)


def check(mesh_text: str = "", *, config: ModelConfig = TINY) -> dict[str, Any]:
    """In bfloat16: by the kernels that are selected on a mesh, and by the references on one device. ``ok`` if the
    log-probabilities agree up to where tokens part, and few of them do."""
    chosen: list[str] = []

    def noted(choose: Any) -> Any:
        def best(*args: Any, **kwargs: Any) -> Any:
            chosen.append(choose(*args, **kwargs))
            return chosen[-1]

        return best

    def completions_by(change: Any, mesh_text: str) -> list[Any]:
        with ExitStack() as patches:
            for name in ("best", "best_quantized_matmul"):
                patches.enter_context(mock.patch.object(dispatch, name, change(getattr(dispatch, name))))
            return completions(mesh_text, config=config)

    found = completions_by(noted, mesh_text)
    wanted = completions_by(lambda _: lambda *_, **__: "reference", "")
    equal, largest = 0, 0.0
    for f, w in zip(found, wanted, strict=True):
        for a, b in zip(f.logprobs, w.logprobs, strict=True):
            largest = max(largest, abs(a.logprob - b.logprob))  # where tokens part, they must have been as likely
            if a.token_id != b.token_id:
                break
            equal += 1
    total = NUM_TOKENS * len(found)
    return {
        "ok": bool(largest < 0.1 and equal > 0.5 * total),
        "implementation": sorted(set(chosen)),
        "equal_tokens": equal,
        "tokens": total,
        "largest_logprob_difference": largest,
    }


def float32_tokens() -> list[dict[str, Any]]:
    """``token_ids`` of the default device in float32, and ``gaps``, of their log-probabilities to the second best."""
    return [
        {"token_ids": list(c.token_ids), "gaps": [e.top[0][1] - e.top[1][1] for e in c.logprobs]}
        for c in completions(dtype="float32", logprobs=2)
    ]


if __name__ == "__main__":
    print(json.dumps(float32_tokens()))
