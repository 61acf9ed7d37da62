"""Why a request is not served."""


class RequestError(ValueError):
    """A request that cannot be served. ``field`` names the offending field; the message has both numbers."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class UnknownLoraError(RequestError):
    """An adapter of that name is not loaded."""


class QueueFullError(RuntimeError):
    """The waiting queue is full; the request was not taken. Retry later."""
