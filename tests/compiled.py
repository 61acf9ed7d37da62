"""Where engines of tests keep their programs: each is traced and compiled once a run, whatever process needs it.

Not for a test that changes what is traced by more than an engine's arguments: the programs would be found by these.
"""

import os

FOLDER = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # tests/conftest.py makes it
