"""Parameters that several threads place."""

import os
import subprocess
import sys

# Another thread runs whenever this one tells of what it does, which it does while it makes a type. NumPy's arrays on a
# device have compiled nothing yet.
SCRIPT = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jaxserve.config import ParallelConfig
from jaxserve.execution import placement
from jaxserve.model.params import TreeSource, init_params
from jaxserve.parallel.mesh import make_mesh
from tests import tiny

shapes = jax.eval_shape(lambda: init_params(tiny.CONFIG, jax.random.key(0)))
params = jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, np.float32)), shapes)
placement.os.cpu_count = lambda: 8
mesh, source = make_mesh(ParallelConfig()), TreeSource(params, tiny.CONFIG)
sys.addaudithook(lambda event, args: time.sleep(0.01) if event == "object.__setattr__" else None)
placed = placement.place_params(source, tiny.CONFIG, tiny.CONFIG, mesh, jnp.dtype("bfloat16"))
assert {leaf.dtype for leaf in jax.tree.leaves(placed)} == {jnp.dtype("bfloat16")}
"""


def test_threads_that_are_the_first_to_use_devices():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])
