"""One process of a cluster that serves the tiny model.

    python -m tests.multihost.worker INDEX COUNT PORT MESHES OUT

builds an engine for each mesh of MESHES (";" between them), has it do ``work`` and, where it leads, writes what came.
Each writes beside it how much it read of the checkpoint.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.joining import follow, joined, leave_cluster
from jaxserve.model.params import TreeSource, init_params, named_leaves
from jaxserve.multihost.cluster import Timeouts
from jaxserve.multihost.process import Process
from jaxserve.sampling_params import SamplingParams
from tests import tiny

CONFIG = replace(tiny.CONFIG, num_layers=2)
# Pages for 72 tokens: four long sequences do not fit together, so that some are preempted. Few shapes to compile, and
# few tokens: a step has a thousand messages between processes.
OPTIONS: dict[str, Any] = {
    "max_model_len": 72,
    "max_num_seqs": 4,
    "num_pages": 18,
    "page_size": 4,
    "prefill_sizes": (16,),
    "decode_sizes": (4,),
    "max_prefill_rows": 1,
    "samplings": ("constrained",),
}
TOKEN = b"secret"


class Checkpoint:
    """A ``ParamSource`` that counts what is read of it."""

    def __init__(self):
        self.sizes: list[int] = []  # bytes; readers are threads
        self._source = TreeSource(init_params(CONFIG, jax.random.key(7)), CONFIG)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self._source.read(name, index)
        self.sizes.append(part.nbytes)
        return part


def build(checkpoint: Checkpoint, **options: Any) -> Engine:
    return Engine.from_params(CONFIG, checkpoint, tiny.tokenizer(), **(OPTIONS | options))


def own_bytes(engine: Engine) -> int:
    """Of the parameters' parts that this process' devices have, each counted once, without the rows that pad V."""
    total = 0
    for name, leaf in named_leaves(engine.loop.runner._params):
        parts = {str(s.index): s for s in leaf.addressable_shards}.values()
        for rows, nbytes in ((s.index[0].indices(len(leaf)), s.data.nbytes) for s in parts):
            is_table = name in ("embed", "head")
            given = len(range(*rows)[: max(0, CONFIG.vocab_size - rows[0])]) if is_table else len(range(*rows))
            total += nbytes * given // len(range(*rows))
    return total


def work(engine: Engine) -> dict[str, Any]:
    """What comes of mixed requests: shared prefixes, preemption, sampling, penalties, scores, an abort, embedding."""
    shared = list(range(2, 34))
    prompts = [*tiny.prompts(4, seed=3), shared, shared]
    params = [
        SamplingParams(max_tokens=20, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=1, seed=5, top_k=20, ignore_eos=True),
        SamplingParams(max_tokens=8, temperature=0, repetition_penalty=1.5),
        SamplingParams(max_tokens=16, temperature=0.7, seed=9, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=20, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=1, logit_bias={40: 3.0}),
    ]
    together = engine.generate(prompts, params)
    stream = engine.stream(prompts[0], params[0])
    begun = [next(stream).token_id for _ in range(2)]
    del stream  # aborts it
    again = engine.generate(prompts[4:], params[4])
    (embedding,) = engine.embed([shared])
    scores = [best.logprob for best in together[5].prompt_logprobs or () if best is not None]
    stats = engine.stats()
    return {
        "tokens": [c.token_ids for c in together + again] + [begun],
        "cached": [c.cached_tokens for c in again],
        "numbers": [round(float(x), 3) for x in (*embedding.values, *scores)],
        "preempted": stats.num_preemptions > 0,
        "recompilations": stats.recompilations_after_ready,
    }


def main(index: int, count: int, port: int, meshes: str, out: Path) -> None:
    process = Process(index, count, f"127.0.0.1:{port}")
    cluster = joined(process, {"mesh": meshes}, TOKEN, Timeouts(start_s=60, heartbeat_s=20))
    found, sizes = {}, {}
    for mesh in meshes.split(";"):
        checkpoint = Checkpoint()
        with build(checkpoint, mesh=mesh, cluster=cluster) as engine:
            sizes[mesh] = {"read": sum(checkpoint.sizes), "own": own_bytes(engine)}
            if process.leads:
                found[mesh] = work(engine)
            else:
                follow(engine, cluster)
    leave_cluster(cluster)
    out.with_name(f"sizes{index}.json").write_text(json.dumps(sizes))
    if process.leads:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
