"""Addresses: whether they can be had, and the system's reason where not."""

import errno
import socket


class ServeError(RuntimeError):
    """The server cannot start: one clear line."""


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_can_bind(host: str, port: int) -> None:
    """Raises ServeError with the system's reason: grpc itself tells no more than that it failed."""
    try:
        for family, kind, protocol, _, where in _addresses(host, port):
            with socket.socket(family, kind, protocol) as probe:
                _bind(probe, family, where)
    except OSError as error:
        raise ServeError(f"cannot listen on {address(host, port)}: {_reason(error)}") from error


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket for ``host``'s first address. ServeError."""
    try:
        family, kind, protocol, _, where = _addresses(host, port)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            _bind(bound, family, where)
            bound.setblocking(False)
        except OSError:
            bound.close()
            raise
        return bound
    except OSError as error:
        raise ServeError(f"cannot bind {address(host, port)}: {_reason(error)}") from error


def _addresses(host: str, port: int) -> list:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


def _bind(unbound: socket.socket, family: int, where: tuple) -> None:
    unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        unbound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    unbound.bind(where)


def _reason(error: OSError) -> str:
    return "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
