"""Which network interface an address belongs to."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str | None:
    """The name of the interface with this IPv4 address; None where it is the main address of none (127.0.0.2)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def set_network_interface(address: str) -> None:
    """Let gloo and NCCL meet at the interface with this address, unless the environment names one. Left alone, gloo
    takes the address that the name of the machine leads to, which is on loopback on many."""
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
