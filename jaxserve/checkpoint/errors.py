"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or served; one line that names the file and the byte, key or tensor."""
