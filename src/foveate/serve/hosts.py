"""Which `Host` a request may name. A page from elsewhere whose name is made to lead to this machine would otherwise
read the answers of a server that is for this machine only (DNS rebinding)."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Addresses to listen on that no other machine reaches."""


def is_known_host(header: str, names: Collection[str]) -> bool:
    """Whether a `Host` header holds an address, which leads nowhere else, `localhost`, or one of `names`."""
    try:
        host = urlsplit(f"//{header}").hostname or ""
        ipaddress.ip_address(host)
    except ValueError:
        name = header.rpartition(":")[0] if ":" in header else header
        name = name.lower().rstrip(".")
        return name in names or name == "localhost" or name.endswith(".localhost")
    return True
