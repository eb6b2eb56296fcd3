"""Host, port and API keys -> the default listening address, a check of the port, the lines printed when ready.

Without API keys the server listens on loopback unless it is told otherwise (`--host`, `BENTOML_HOST`): a laptop's model
should not answer a whole network by default. In a container of BentoML it always listens on all interfaces, because
the container's own network decides who reaches it.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping

LOOPBACK, ALL_INTERFACES = "127.0.0.1", "0.0.0.0"
IN_CONTAINER = "BENTO_PATH"  # BentoML's images define it


class PortTaken(OSError):
    """Another process listens there; the message is one line for the operator."""


def default_host(has_keys: bool, environment: Mapping[str, str]) -> str:
    """Where to listen if nobody says."""
    return ALL_INTERFACES if has_keys or IN_CONTAINER in environment else LOOPBACK


def check_port(host: str, port: int) -> None:
    """Raises PortTaken. Other failures are left to the server, which meets them again."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(
                    f"port {port} on {host} is taken by another program: end that, or choose another port "
                    f"(make serve PORT={port + 1}, or bentoml serve --port {port + 1})"
                ) from None


def listening_addresses() -> list[tuple[str, int]]:
    """(host, port) of every TCP socket that this process accepts connections on; a worker inherits its parent's."""
    import psutil

    found = psutil.Process().net_connections(kind="tcp")
    return sorted({(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN})


def ready_lines(tag: str, addresses: list[tuple[str, int]], has_keys: bool, has_chat_page: bool) -> list[str]:
    """What a person needs to know once the model is loaded: where it answers, and who can reach it."""
    host, port = addresses[0] if addresses else (LOOPBACK, 8000)
    address = ipaddress.ip_address(host)
    name = "localhost" if address.is_unspecified else f"[{host}]" if address.version == 6 else host
    url = f"http://{name}:{port}"
    reach = "this machine only (loopback)" if address.is_loopback else "every host that reaches this port"
    keys = "requests need an API key" if has_keys else "no API key is needed"
    if not has_keys and not address.is_loopback:
        keys += " (set CHATGLM_API_KEYS)"
    page = [f"  chat page  {url}/chat"] if has_chat_page else []
    return [f"{tag} is ready at {url}/v1", *page, f"  access     {reach}; {keys}"]
