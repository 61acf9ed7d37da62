"""Our own checkpoints: orbax folders of the canonical parameters."""

from jaxserve.checkpoint.orbax.checkpoint import OrbaxCheckpoint

__all__ = ["OrbaxCheckpoint"]
