"""Compiles every case for TPUs that are not there, and prints what came of each as JSON; ``launch`` starts it.

python -m tests.tpu_compile.compile_all NAME ...
"""

import json
import math
import re
import sys
import time
from collections import Counter
from typing import Any

from jax.experimental import topologies

from jaxserve.config import ParallelConfig
from jaxserve.execution.lowering import compile_step
from jaxserve.parallel.mesh import make_mesh
from tests.described_step import described_step
from tests.tpu_compile.cases import STEPS, StepCase

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def compile_bucket(case: StepCase) -> dict[str, Any]:
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices)
    mesh = make_mesh(ParallelConfig(stage=case.stage, tensor=case.tensor), devices)
    start = time.perf_counter()
    lowered, params, state = described_step(mesh, case.bucket)
    compiled = compile_step(lowered, mesh)
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None and text is not None
    pages = state.kv_pages[0]
    weights = [math.prod(x.sharding.shard_shape(x.shape)) for x in params.values()]
    return {
        "device_kind": devices[0].device_kind,
        "collectives": Counter(COLLECTIVE.findall(text)),
        "alias_bytes": analysis.alias_size_in_bytes,
        "temp_bytes": analysis.temp_size_in_bytes,
        "layer_cache_bytes": math.prod(pages.sharding.shard_shape(pages.shape)) * pages.dtype.itemsize,
        "argument_bytes": analysis.argument_size_in_bytes,
        "weight_bytes": 2 * sum(weights),
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    for name in sys.argv[1:]:
        try:
            found[name] = compile_bucket(STEPS[name])
        except Exception as error:  # the others are compiled all the same
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
