"""What the wire cannot hold, refused by name."""

from jaxserve.errors import RequestError


class Refusing:
    """Turns protobuf's refusal of a value (type, range, invalid Unicode) into a RequestError that names the field."""

    def __init__(self, field: str):
        self.field = field

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (TypeError, ValueError, KeyError, AttributeError)) and not isinstance(error, RequestError):
            raise RequestError(self.field, str(error)) from error
