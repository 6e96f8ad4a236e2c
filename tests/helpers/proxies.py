"""A network that can be broken: a TCP proxy that holds, delays, spoils or cuts what goes through it."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time

CHUNK_BYTES = 1 << 16


class Proxy:
    """Listens on a port of its own and forwards to ``target`` (host:port). The faults are on until ``heal``."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay_s = 0.0
        self.num_spoiled = 0
        self._flows = threading.Event()  # cleared: nothing gets through, and nobody is told
        self._flows.set()
        self._is_cut = False
        self._spoils: random.Random | None = None
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection and refuse new ones, as the machine of a process does that died."""
        self._is_cut = True
        self._end_all()

    def hold(self) -> None:
        """Let nothing through, in either direction."""
        self._flows.clear()

    def spoil(self, seed: int) -> None:
        """Replace what comes next by noise."""
        self._spoils = random.Random(seed)

    def heal(self) -> None:
        """End all faults."""
        self.delay_s, self._spoils, self._is_cut = 0.0, None, False
        self._flows.set()

    def close(self) -> None:
        """End everything."""
        self.cut()
        self._flows.set()
        self._listener.close()

    def _end_all(self) -> None:
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._sockets.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                near.close()
                continue
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                if self.delay_s:
                    time.sleep(self.delay_s)
                self._flows.wait()
                if self._spoils is not None:
                    chunk = self._spoils.randbytes(len(chunk))
                    self.num_spoiled += 1
                sink.sendall(chunk)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
