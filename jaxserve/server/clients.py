"""Who a request is from, for fairness and limits among clients."""

from urllib.parse import unquote

from jaxserve.server.options import ServerOptions
from jaxserve.server.security import bearer_of, key_id

CLIENT_HEADER = "jaxserve-client"  # gRPC metadata and HTTP header
MAX_NAME_LEN = 128


def client_name(options: ServerOptions, authorization: str | None, given: str | None, address: str) -> str:
    """Its token, where the server asks for tokens; else the name that it gives itself; else its address.

    Args:
        authorization: the header of that name.
        given: the header ``jaxserve-client``. A name that anybody may give is believed only where nobody is known:
            it is for those who mean well, as a gateway that serves several users.
        address: without port.
    """
    if options.api_keys_file is not None:
        return f"token {key_id(bearer_of(authorization or ''))}"
    return f"name {given[:MAX_NAME_LEN]}" if given else f"address {address}"


def address_of_peer(peer: str) -> str:
    """The address in what gRPC calls a peer: ``ipv4:ADDRESS:PORT``, ``ipv6:[ADDRESS]:PORT`` (escaped), ``unix:``."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer
