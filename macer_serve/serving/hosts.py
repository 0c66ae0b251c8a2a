"""Which requests a browser may send on behalf of a web page: host names and origins are checked.

A page of any site can let its own name point to 127.0.0.1 (DNS rebinding), and can send simple requests across origins
without asking. Neither may use a server that only this machine can reach.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import ClassVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from macer_serve.serving.problems import problem

LOCAL_NAMES = ("localhost", "*.localhost")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:@/\[\]]+)(?::\d{0,5})?")


def is_address(host: str) -> bool:
    """Returns whether the host is an IP address, in brackets or not."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches a server that listens on the host."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def trusted(names: Iterable[str], bound: str) -> frozenset[str]:
    """Returns the host names that a server answers to; `*` stands for all, `*.example.org` for subdomains.

    `names` are the operator's, `bound` is the host that the server listens on. A server that listens beyond this
    machine answers to all names, unless the operator lists some: its names are those of the network, which it cannot
    know.
    """
    own = frozenset(name.lower().rstrip(".") for name in names)
    if not own and not is_loopback(bound):
        return frozenset("*")
    return own | {*LOCAL_NAMES, bound.lower()}


class Hosts:
    """Refuses requests to host names that are not the server's, and requests of foreign pages."""

    names: ClassVar[frozenset[str]] = frozenset("*")
    origins: ClassVar[frozenset[str]] = frozenset()  # whose pages may send requests

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    @classmethod
    def allow(cls, names: Iterable[str], origins: Iterable[str]) -> None:
        """Sets the host names and the origins for this process."""
        cls.names, cls.origins = frozenset(names), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (fault := self._fault(scope)) is None:
            await self._app(scope, receive, send)
            return
        await problem(*fault)(scope, receive, send)

    def _fault(self, scope: Scope) -> tuple[int, str, str] | None:
        """Returns the status, title and detail with which a request is refused; None for most."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if not hosts and scope["http_version"] == "1.0":
            return None  # no browser's
        if len(hosts) != 1 or not (host := _HOST.fullmatch(hosts[0])):
            return 400, "Bad Request", "a request needs one Host header with the name of the server"
        if not self._is_trusted(host[1].lower().rstrip(".")):
            detail = f"{host[1][:100]!r} is not a name of this server; its operator lists them in trusted_hosts"
            return 421, "Misdirected Request", detail
        site = headers.get("sec-fetch-site", "none")  # browsers send it, and pages cannot set it
        if scope["method"] == "POST" and site not in ("none", "same-origin"):
            origin = headers.get("origin", "")
            if "*" not in self.origins and origin not in self.origins:
                detail = f"pages of {origin[:100]!r} may not use this server; cors_origins lists those that may"
                return 403, "Forbidden", detail
        return None

    def _is_trusted(self, host: str) -> bool:
        """Returns whether a host, without port, is the server's. An address is: a page cannot rebind one."""
        if "*" in self.names or host in self.names or is_address(host):
            return True
        return any(name.startswith("*.") and host.endswith(name[1:]) for name in self.names)
