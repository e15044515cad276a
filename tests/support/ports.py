"""Ports for the servers that tests start as processes of their own."""

import random
import socket
from contextlib import ExitStack

# Below those that the kernel gives to outgoing connections, of which one may come just before the
# server; at random, for other tests may be looking too.
PORTS = range(15_000, 30_000)


def free_ports(number: int) -> list[int]:
    """Ports on loopback that no one has now; all are held at once so that none comes twice."""
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < number:
            port = random.SystemRandom().choice(PORTS)
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
