"""Refuses every connection that leaves this machine, where `LOOPBACK_ONLY` is set.

Python imports a module of this name at its start: with this folder in `PYTHONPATH` the guard is in every process that
a test starts, and in those that they start.
"""

import ipaddress
import os
import socket
import sys


# Names looked up and addresses connected to in vain. `datasets` asks for one name by itself and does without.
refused: list[str] = []
EXPECTED = ("datasets-server.127.0.0.1",)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "", None)


def _check(event: str, arguments: tuple) -> None:
    if event not in ("socket.connect", "socket.getaddrinfo") or "LOOPBACK_ONLY" not in os.environ:
        return
    if event == "socket.getaddrinfo":
        host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        if host is None or _is_loopback(host):
            return
        if host in EXPECTED:
            raise socket.gaierror(socket.EAI_NONAME, f"{host} is not known")
    else:
        if arguments[0].family not in (socket.AF_INET, socket.AF_INET6) or _is_loopback(arguments[1][0]):
            return
        host = arguments[1][0]
    refused.append(host)
    sys.stderr.write(f"guard: a connection to {host} was refused\n")
    raise RuntimeError(f"A test of the Hub wants to reach {host}. Only 127.0.0.1 is allowed.")


sys.addaudithook(_check)
