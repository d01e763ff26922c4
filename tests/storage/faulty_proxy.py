"""A server in front of a store that loses, refuses and delays requests."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

_BODY = b"<Error><Code>Injected</Code></Error>"


class FaultyProxy:
    """Forwards connections to ``endpoint``; each one takes the next of ``faults``, if any is left.

    ``"reset"`` closes the connection before anything is forwarded, ``"lost"`` once the store has replied, ``"hang"``
    never replies, and a number is an HTTP status that the store itself does not see.
    """

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._target = (str(parts.hostname), int(parts.port or 0))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.faults: list[str | int] = []
        self.requests: list[str] = []
        """The method and path of each connection's first request, in order."""
        self._ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                fault = self.faults.pop(0) if self.faults else None
                threading.Thread(target=self._serve, args=(connection, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str | int | None) -> None:
        with client, contextlib.suppress(OSError):
            first = client.recv(1 << 16)
            self.requests.append(b" ".join(first.split(b" ", 2)[:2]).decode())
            if fault == "hang":
                self._ended.wait(60)
            elif isinstance(fault, int):
                head = f"HTTP/1.1 {fault} Injected\r\nContent-Length: {len(_BODY)}\r\nConnection: close\r\n\r\n"
                client.sendall(head.encode() + _BODY)
            elif fault != "reset":
                self._forward(client, first, lose_reply=fault == "lost")
            client.shutdown(socket.SHUT_RDWR)  # another thread may still be reading it

    def _forward(self, client: socket.socket, first: bytes, *, lose_reply: bool) -> None:
        with socket.create_connection(self._target, timeout=60) as store:
            store.sendall(first)
            threading.Thread(target=_copy, args=(client, store), daemon=True).start()
            while (data := store.recv(1 << 16)) and not lose_reply:
                client.sendall(data)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
