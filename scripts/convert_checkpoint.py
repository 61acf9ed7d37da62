#!/usr/bin/env python
"""Converts a checkpoint: ``scripts/convert_checkpoint.py SRC DST [--dtype bfloat16] [--format safetensors]``.

The same as ``jaxserve convert``.
"""

import sys

from jaxserve.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["convert", *sys.argv[1:]]))
