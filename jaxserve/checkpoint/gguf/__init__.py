"""GGUF files, dequantized as they are read."""

from jaxserve.checkpoint.gguf.checkpoint import GGUFCheckpoint

__all__ = ["GGUFCheckpoint"]
