"""Who may talk to the server: bearer tokens and TLS, for gRPC and HTTP alike."""

import hashlib
import hmac
import ipaddress
import logging
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from jaxserve.server.interceptors import Continuation, same_form
from jaxserve.server.options import ServerOptions

logger = logging.getLogger(__name__)

OPEN_METHODS = "/grpc.health.v1.Health/"  # no token is asked for
MIN_KEY_LEN = 8


class ApiKeys:
    """The tokens of which a client must show one. Their texts are not kept: only digests, so that nothing can print
    them, and comparing takes the same time whatever is shown."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> "ApiKeys":
        """One key a line; empty lines and those that begin with ``#`` are none. ValueError naming file and line."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ValueError(f"api_keys_file={path}: {reason}") from None
        keys = []
        for number, line in enumerate(lines, 1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if len(key) < MIN_KEY_LEN or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"api_keys_file={path}: line {number} is no key of at least {MIN_KEY_LEN} ASCII characters without "
                    f"spaces, it has {len(key)}"
                )
            keys.append(key)
        if not keys:
            raise ValueError(f"api_keys_file={path}: has 0 keys, at least 1 is needed")
        return cls(keys)

    def accept(self, authorization: str | bytes | None) -> bool:
        """Whether the header's value is ``Bearer KEY`` with one of the keys."""
        text = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization or ""
        key = bearer_of(text)
        return key is not None and self.has(key)

    def has(self, key: str) -> bool:
        shown = _digest(key)
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, shown)
        return found


def bearer_of(authorization: str) -> str | None:
    """KEY of ``Bearer KEY``."""
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def key_id(key: str | None) -> str:
    """A name for a key that does not tell it."""
    return _digest(key or "").hex()[:16]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """UNAUTHENTICATED for every call without a key, those of grpc.health.v1 excepted."""

    def __init__(self, keys: ApiKeys):
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        details: Any = handler_call_details
        metadata = dict(details.invocation_metadata)
        if details.method.startswith(OPEN_METHODS) or self._keys.accept(metadata.get("authorization")):
            return handler
        return _refusing(handler)


def _refusing(handler: Any) -> Any:
    """As ``handler`` in form, so that the client reads the status whatever the method's."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> NoReturn:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token of this server is needed: authorization")
        raise AssertionError

    return None if handler is None else same_form(handler, refuse)  # None: no such method


def http_context(options: ServerOptions) -> ssl.SSLContext | None:
    """TLS for HTTP, None without. ValueError naming the file that cannot be used."""
    if options.tls_cert is None or options.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"tls_cert={options.tls_cert}, tls_key={options.tls_key}: {error}") from None
    if options.tls_client_ca is not None:
        try:
            context.load_verify_locations(options.tls_client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"tls_client_ca={options.tls_client_ca}: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def grpc_credentials(options: ServerOptions) -> grpc.ServerCredentials | None:
    """The same for gRPC, from files that ``http_context`` has found good."""
    if options.tls_cert is None or options.tls_key is None:
        return None
    pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
    roots = None if options.tls_client_ca is None else options.tls_client_ca.read_bytes()
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``; a name other than localhost may be anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warn_if_open(options: ServerOptions) -> None:
    """Says loudly what a wider bind than loopback lacks."""
    if is_loopback(options.host):
        return
    known = options.api_keys_file is not None or options.tls_client_ca is not None
    if not known:
        logger.warning(
            "ANYONE WHO REACHES %s CAN USE THIS SERVER: no tokens (api_keys_file) and no client certificates "
            "(tls_client_ca) are asked for",
            options.host,
        )
    if options.tls_cert is None:
        logger.warning("no TLS on %s: %s travel in the clear", options.host, "tokens and texts" if known else "texts")
