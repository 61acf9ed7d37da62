#!/usr/bin/env python
"""One process of several that serve a model: ``scripts/launch_multihost.py MODEL --mesh mesh.yaml``, on each host.

The same as ``jaxserve launch``.
"""

import sys

from jaxserve.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "launch")
    main()  # not ``run``: it ends the process without waiting for threads that wait for a host that has gone
