"""Small messages over a TCP connection, one JSON object a line.

Public names: `MessageLine`, `listen`, `free_port`.
"""

import contextlib
import json
import socket
from typing import Any

__all__ = ["MessageLine", "free_port", "listen"]

_LONGEST_MESSAGE = 4096  # bytes that a stranger may make us read


class MessageLine:
    """One end of a connection.

    Args:
      connection: owned from now on.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._reader = connection, connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message of values that JSON knows."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Waits for the next message.

        Args:
          seconds: None: for as long as it takes.

        Raises:
          OSError: the connection broke or was closed, or nothing came in time.
          ValueError: what came is no message.
        """
        self._connection.settimeout(seconds)
        text = self._reader.readline(_LONGEST_MESSAGE)
        if not text:
            raise ConnectionResetError("the other end hung up")
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError(f"{message!r} is no message")
        return message

    def keep_alive(self, seconds: float) -> None:
        """Lets the kernel break the connection when the other host is silent for `seconds`."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Idle for half the time, then two probes. Not every system has all three options.
        options = {"TCP_KEEPIDLE": seconds // 2, "TCP_KEEPINTVL": seconds // 4, "TCP_KEEPCNT": 2}
        for name, value in options.items():
            if hasattr(socket, name):
                self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), int(value))

    def close(self) -> None:
        """Hangs up; a thread that waits in `receive` gets an OSError."""
        with contextlib.suppress(OSError):  # the other end was first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self._connection.close()


def listen(host: str, port: int) -> socket.socket:
    """Listens at a port; host "": on all interfaces. Port 0 chooses a free one."""
    if host == "" and socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
        )
    return socket.create_server((host, port), backlog=128)


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a port that was free a moment ago."""
    with listen(host, 0) as server:
        return server.getsockname()[1]
