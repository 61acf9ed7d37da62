"""The command line, a thin layer over the library and the wire. jax is imported inside the commands that need it."""

from jaxserve.cli.app import main

__all__ = ["main"]
