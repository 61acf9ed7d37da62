"""What structured output costs a decode step: 32 rows that write JSON of a schema, beside 32 rows that write anything.

    python benchmarks/structured_output.py [--models tiny default] [--rounds 5] [--out FILE]

Both kinds run in one engine and take turns, so that a busy spell of the machine meets both. A step is timed from one
dispatch to the next, with 32 decode rows and no prompt; reported are the medians, the ratio of the rounds' medians and
the host's part of a step: "masks" is what structured output adds to it, while the device is in the forward pass.
"tiny" is a model of one layer, where a step is all overhead: the worst case.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from jaxserve import Engine, SamplingParams
from jaxserve.bench.environment import environment
from jaxserve.config import ModelConfig
from jaxserve.engine.step_times import SECONDS, StepTimes
from jaxserve.model.params import init_params
from jaxserve.sampling_params import StructuredOutputs

ROWS, PROMPT_LEN, NEW_TOKENS = 32, 32, 64
OPTIONS: dict[str, Any] = {
    "max_model_len": PROMPT_LEN + NEW_TOKENS + 32,
    "max_num_seqs": ROWS,
    "decode_sizes": (ROWS,),
    "prefill_sizes": (256,),
    "max_prefill_rows": 8,
    "prefix_caching": False,
    "samplings": ("random", "constrained"),
}
SCHEMA = {
    "type": "array",
    "minItems": 1000,  # so that no row ends before the others
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}
FREE: dict[str, Any] = {"temperature": 0.8, "max_tokens": NEW_TOKENS, "ignore_eos": True}
KINDS: dict[str, dict[str, Any]] = {"free": FREE, "json": FREE | {"structured_outputs": StructuredOutputs(json=SCHEMA)}}


def make_engine(model: str) -> Engine:
    if model != "tiny":
        from jaxserve.checkpoint.resolve import DEFAULT_MODEL

        return Engine.from_pretrained(DEFAULT_MODEL if model == "default" else model, **OPTIONS)
    from jaxserve.checkpoint.open import open_checkpoint
    from jaxserve.checkpoint.resolve import DEFAULT_MODEL

    with open_checkpoint(DEFAULT_MODEL) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None  # the default model has one
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=32, eos_token_ids=tokenizer.eos_token_ids,
    )  # fmt: skip
    return Engine.from_params(config, init_params(config, jax.random.key(0)), tokenizer, model_name="tiny", **OPTIONS)


def run(engine: Engine, kind: str, seed: int) -> tuple[list[float], list[StepTimes]]:
    """Seconds of every step of ``ROWS`` decode rows, and where the host's went."""
    r = random.Random(seed)
    vocab = engine.model_config.vocab_size
    for i in range(ROWS):
        prompt = [r.randrange(3, vocab) for _ in range(PROMPT_LEN)]
        engine.add_request(engine.make_request(prompt, SamplingParams(seed=seed * ROWS + i, **KINDS[kind])))
    walls, times = [], []
    start = time.perf_counter()
    while engine.has_unfinished():
        taken: list[StepTimes] = []
        events = engine.step(on_times=taken.append)
        end = time.perf_counter()
        assert all(e.finish_reason in (None, "length") for e in events)
        batch = taken[0].batch
        if (
            batch is not None
            and batch.num_decode_rows == ROWS
            and batch.bucket.prefill_tokens == 0
            and len(events) == ROWS
        ):
            walls.append(end - start)
            times.append(taken[0])
        start = end
    return walls, times


def measure(model: str, rounds: int) -> dict[str, Any]:
    with make_engine(model) as engine:
        start = time.perf_counter()
        engine.make_request([5], SamplingParams(**KINDS["json"]))  # the tokenizer's bridge and the grammar, once
        first_s = time.perf_counter() - start
        medians: dict[str, list[float]] = {kind: [] for kind in KINDS}
        host: dict[str, list[StepTimes]] = {kind: [] for kind in KINDS}
        for number in range(rounds + 1):
            for kind in KINDS:
                walls, times = run(engine, kind, number)
                if number:  # the first round warms up
                    medians[kind].append(statistics.median(walls))
                    host[kind] += times
        assert engine.stats().recompilations_after_ready == 0
        ratios = [b / a for a, b in zip(medians["free"], medians["json"], strict=True)]
        return {
            "model": engine.model_name,
            "vocab_size": engine.model_config.vocab_size,
            "rows": ROWS,
            "tpot_ms": {kind: round(1e3 * statistics.median(values), 3) for kind, values in medians.items()},
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(x, 3) for x in ratios],
            "host_ms": {
                kind: {name: round(1e3 * statistics.median(getattr(t, name) for t in times), 3) for name in SECONDS}
                for kind, times in host.items()
            },
            "first_request_ms": round(1e3 * first_s, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="What structured output costs a decode step.")
    parser.add_argument("--models", nargs="+", default=["tiny", "default"], help="tiny, default, or a checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for model in args.models:
        rows.append(measure(model, args.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        command = f"python benchmarks/structured_output.py --models {' '.join(args.models)} --rounds {args.rounds}"
        args.out.write_text(json.dumps({"command": command, **environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
