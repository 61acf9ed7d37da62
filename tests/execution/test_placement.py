"""Parameters that several threads place."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import ParallelConfig
from jaxserve.execution import placement
from jaxserve.model.params import TreeSource, init_params
from jaxserve.parallel.mesh import make_mesh
from tests import tiny

FLOAT32 = jnp.dtype("float32")

# Another thread runs whenever this one tells of what it does, which it does while it makes a type. Of a mesh whose
# devices are not all of this process, JAX goes over those that are.
SCRIPT = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jaxserve.config import ParallelConfig
from jaxserve.execution import placement
from jaxserve.model.params import TreeSource, init_params
from jaxserve.parallel.mesh import make_mesh
from tests import tiny

shapes = jax.eval_shape(lambda: init_params(tiny.CONFIG, jax.random.key(0)))
params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
placement.os.cpu_count = lambda: 8
jax.sharding.NamedSharding.is_fully_addressable = property(lambda self: False)
mesh, source = make_mesh(ParallelConfig()), TreeSource(params, tiny.CONFIG)
sys.addaudithook(lambda event, args: time.sleep(0.01) if event == "object.__setattr__" else None)
placed = placement.place_params(source, tiny.CONFIG, tiny.CONFIG, mesh, jnp.dtype("bfloat16"))
assert {leaf.dtype for leaf in jax.tree.leaves(placed)} == {jnp.dtype("bfloat16")}
"""


def test_threads_that_are_the_first_to_use_devices():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])


def test_live_arrays_are_placed_by_the_caller_alone(monkeypatch: pytest.MonkeyPatch):
    """What brings their parts where they belong may be collectives, which two threads must not launch at once."""
    mesh = make_mesh(ParallelConfig(tensor=2))
    by_rows = NamedSharding(mesh, PartitionSpec("tensor"))
    params = jax.tree.map(
        lambda x: jax.device_put(x, by_rows) if x.shape[0] % 2 == 0 else x, init_params(tiny.CONFIG, jax.random.key(0))
    )
    put, threads = jax.device_put, set()

    def device_put(x, *args, **options):
        threads.add(threading.get_ident())
        return put(x, *args, **options)

    monkeypatch.setattr(jax, "device_put", device_put)
    placed = placement.place_params(TreeSource(params, tiny.CONFIG), tiny.CONFIG, tiny.CONFIG, mesh, FLOAT32)
    assert threads == {threading.get_ident()}
    assert np.array_equal(placed.final_norm, params.final_norm)
