"""Addresses to listen on, and how clients write them."""

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name is looked up as for listening, and an unknown one is not."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError):
        return False
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback


def host_in_url(host: str) -> str:
    """`::1` -> `[::1]`; names and IPv4 addresses stay as they are."""
    return f"[{host}]" if ":" in host else host
