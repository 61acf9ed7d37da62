"""Pipeline stages: one step at a time against a step in every stage, by idle stages counted and by time.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/pipeline_bubble.py --mesh stage=4

Prints a JSON line a row. Virtual CPU devices share the processor's cores: a stage that has nothing to do calculates
padding on them, so that what is idle costs time there, as it does on devices of their own by waiting; but stages do not
calculate side by side on more cores than there are.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax

from jaxserve.bench.collectives import textbook_bubble
from jaxserve.bench.environment import environment
from jaxserve.bench.offline import drive
from jaxserve.config import ModelConfig
from jaxserve.engine.engine import Engine
from jaxserve.model.params import init_params
from jaxserve.parallel.mesh import parse_mesh

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=512,
    eos_token_ids=(),
)
PROMPT, OUTPUT = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Pipeline stages: what is idle, and what it costs.")
    parser.add_argument("--mesh", default="stage=4")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    parallel, params = parse_mesh(asked.mesh), init_params(CONFIG, jax.random.key(0))
    shared = -(-asked.batch // parallel.stage)
    engines = {
        lookahead: Engine.from_params(
            CONFIG,
            params,
            mesh=asked.mesh,
            lookahead=lookahead,
            max_num_seqs=asked.batch,
            decode_sizes=tuple(sorted({shared, asked.batch})),
            prefill_sizes=(128,),
            max_prefill_rows=8,
            max_model_len=PROMPT + OUTPUT + 16,
            prefix_caching=False,
            samplings=("greedy",),
        )
        for lookahead in (0, 1)
    }
    prompts = [[(7 * i + j) % CONFIG.vocab_size for j in range(PROMPT)] for i in range(asked.batch)]
    seen: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for repeat in range(asked.repeats + 1):
        for lookahead, engine in engines.items():  # one after the other, so that both have the machine as it is
            stages, runs = engine.loop.stages, []
            for num_tokens in (1, OUTPUT):
                ticks, idle, cpu = stages.num_ticks, stages.num_idle, time.process_time()
                run = drive(engine, prompts, [num_tokens] * asked.batch)
                runs.append(
                    (run.duration_s, time.process_time() - cpu, stages.num_ticks - ticks, stages.num_idle - idle)
                )
            wall, cpu, ticks, idle = (b - a for a, b in zip(*runs))
            if repeat:  # the first warms up
                seen[lookahead].append({"wall_s": wall, "cpu_s": cpu, "ticks": ticks, "idle": idle})
    for lookahead, rows in seen.items():
        middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        row = {
            "mesh": asked.mesh,
            "lookahead": lookahead,
            "batch": asked.batch,
            "ms_per_step": 1e3 * middle["wall_s"] / (OUTPUT - 1),
            "cpu_ms_per_step": 1e3 * middle["cpu_s"] / (OUTPUT - 1),
            "ticks": middle["ticks"],
            "bubble": middle["idle"] / (middle["ticks"] * parallel.stage),
            "textbook_whole_steps": textbook_bubble(parallel.stage, 1),
            "textbook_shared_steps": textbook_bubble(parallel.stage, min(parallel.stage, asked.batch)),
        }
        print(json.dumps(row | {"device": environment()["device"], "repeats": asked.repeats}), flush=True)


if __name__ == "__main__":
    main()
