"""Checkpoints: from a name or path to a config, a tokenizer and a parameter tree of numpy arrays."""

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.gguf import GGUFCheckpoint
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.info import CheckpointInfo, checkpoint_info
from jaxserve.checkpoint.open import open_checkpoint
from jaxserve.checkpoint.resolve import DEFAULT_MODEL, resolve_model

__all__ = [
    "DEFAULT_MODEL",
    "CheckpointError",
    "CheckpointInfo",
    "GGUFCheckpoint",
    "HFCheckpoint",
    "checkpoint_info",
    "open_checkpoint",
    "resolve_model",
]
