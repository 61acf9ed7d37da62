"""One process of a cluster that serves a golden model with adapters, each from a folder of its own.

    python -m tests.multihost.lora_worker INDEX COUNT PORT MESHES FOLDER

builds an engine for each mesh of MESHES (";" between them), has it do ``work`` and be asked for what cannot be loaded,
and, where it leads, writes FOLDER/found.json. Paths of adapters are relative to FOLDER/INDEX.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.hf.adapter import read_adapter
from jaxserve.engine.engine import Engine
from jaxserve.engine.joining import follow, joined, leave_cluster
from jaxserve.multihost.cluster import Timeouts
from jaxserve.multihost.process import Process
from jaxserve.sampling_params import SamplingParams
from tests.families import golden as models
from tests.lora import golden

EVERYWHERE, SOME = golden.load("llama_all"), golden.load("llama_some")
TOKEN = b"secret"
REFUSED = ("missing", "other")  # of process 1


def build(**options: Any) -> Engine:
    sizes = {"max_num_seqs": 3, "decode_sizes": (3,), "num_pages": 48, "max_loras": 2, "max_lora_rank": 4}
    return models.engine(EVERYWHERE, lora_modules={"all": "all"}, **(sizes | options))


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def work(engine: Engine) -> dict[str, Any]:
    """What comes of two adapters and the base in one batch, and of one that gets another's slot under a stream."""
    engine.load_lora("some", "some")
    names = [None, "all", "some"]
    prompts = [EVERYWHERE.prompt] * 3
    mixed = [c.token_ids for c in engine.generate(prompts, greedy(8), lora=names)]
    mixed += [c.token_ids for c in engine.generate([p[i:] for i, p in enumerate(prompts)], greedy(8), lora=names[::-1])]
    stream = engine.stream(SOME.prompt, greedy(12), lora="some")
    streamed = [next(stream).token_id for _ in range(3)]
    engine.unload_lora("all")
    slot = engine.load_lora("again", "some").slot
    again = engine.generate(prompts, greedy(8), lora=["again", None, "some"])
    streamed += [event.token_id for event in stream]
    engine.unload_lora("again")
    engine.load_lora("all", "all")
    return {
        "tokens": [*mixed, *(c.token_ids for c in again), streamed],
        "slots": [slot, *(adapter.slot for adapter in engine.list_loras())],
        "recompilations": engine.stats().recompilations_after_ready,
    }


def refusals(engine: Engine) -> dict[str, str]:
    """What is said where an adapter cannot be loaded, of which nothing is left. Afterwards there is none at all."""
    said = {}
    for path in REFUSED:
        before = engine.list_loras()
        try:
            engine.load_lora("x", path)
        except ValueError as error:
            said[path] = str(error)
        assert engine.list_loras() == before
    for adapter in engine.list_loras():
        engine.unload_lora(adapter.name)
    try:
        engine.add_lora("x", read_adapter("some", engine.model_config, 4))
    except ValueError as error:
        said["live"] = str(error)
    return said


def main(index: int, count: int, port: int, meshes: str, folder: Path) -> None:
    os.chdir(folder / str(index))
    process = Process(index, count, f"127.0.0.1:{port}")
    cluster = joined(process, {"mesh": meshes}, TOKEN, Timeouts(start_s=60, heartbeat_s=20))
    found = {}
    for mesh in meshes.split(";"):
        with build(mesh=mesh, cluster=cluster) as engine:
            if process.leads:
                found[mesh] = {"work": work(engine), "refused": refusals(engine)}
                assert engine.list_loras() == ()
                engine.load_lora("all", "all")
                found[mesh]["afterwards"] = work(engine)
            else:
                follow(engine, cluster)
    leave_cluster(cluster)
    if process.leads:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
