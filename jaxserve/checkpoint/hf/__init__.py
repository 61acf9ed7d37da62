"""Hugging Face folders: config.json and safetensors, in and out."""

from jaxserve.checkpoint.hf.checkpoint import HFCheckpoint

__all__ = ["HFCheckpoint"]
