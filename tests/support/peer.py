"""A peer that sends, over a real socket, what no HTTP server would: for what befalls the event
stream, and for what goes out to whom."""

import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import gevent
from gevent.server import StreamServer

Talk = Callable[[socket.socket], object]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
CHUNKED = HEAD.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
STATE = b"event: state\ndata: 1\n\n"


class Peer:
    """A server on loopback that lets `talk` have each connection once a request has come; `heads`
    are the requests. With `talk` over the connection is closed."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.heads: list[bytes] = []
        self._open: set[socket.socket] = set()
        self._server = StreamServer(("127.0.0.1", 0), self._serve)

    def __enter__(self) -> "Peer":
        self._server.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/events"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def turn(self, talk: Talk) -> None:
        """From now on it talks so; what it was at is cut off."""
        self.talk = talk
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _serve(self, sock: socket.socket, _address: object) -> None:
        self._open.add(sock)
        with suppress(OSError):
            self.heads.append(sock.recv(65536))
            self.talk(sock)
            sock.shutdown(socket.SHUT_WR)
            until_gone(sock)
        self._open.remove(sock)
        sock.close()


def until_gone(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def refusal(status: int, **headers: object) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} No\r\n{lines}Content-Length: 0\r\n\r\n".encode()


def at_once(*pieces: bytes) -> Talk:
    """Sends these bytes and closes."""
    return lambda sock: sock.sendall(b"".join(pieces))


def for_ever(head: bytes, piece: bytes, pause: float = 0.005) -> Talk:
    """Sends the piece again and again, at a pace."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(piece)
            gevent.sleep(pause)

    return talk


def hang(data: bytes = b"") -> Talk:
    """Sends these bytes and nothing more."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(data)
        until_gone(sock)

    return talk


def reset(data: bytes = b"") -> Talk:
    """Sends these bytes and ends the connection with a reset."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    return talk


class Flood:
    """Sends a piece as fast as it is taken; `sent` counts the bytes of all connections."""

    def __init__(self, head: bytes, piece: bytes) -> None:
        self.sent = 0
        self._head, self._pieces = head, piece * (2**20 // len(piece))

    def __call__(self, sock: socket.socket) -> None:
        sock.sendall(self._head)
        left = memoryview(self._pieces)
        while True:
            sent = sock.send(left)
            self.sent += sent
            left = left[sent:] or memoryview(self._pieces)
