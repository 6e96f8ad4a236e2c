"""The network between processes that already run, broken from outside: their own TCP sockets are borrowed and spoiled. Linux only.

A borrowed socket is the same socket as the owner's (``pidfd_getfd``): a filter on it drops what arrives, as a cut cable does,
and what is written to it goes out between the owner's own bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import struct
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

PIDFD_GETFD = 438  # the same number on all architectures
ATTACH_FILTER, DETACH_FILTER = 26, 27
RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)  # the one instruction of a filter that lets nothing through
RESCAN_S = 0.05
NOISE_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class End:
    """One end of a TCP connection (``far`` is 0 for a socket that listens), and where its socket is: in which process, as which file."""

    pid: int
    fd: int
    near: int
    far: int


def ends(pids: Collection[int]) -> list[End]:
    """All TCP sockets of some processes that are connected or listen."""
    ports = _ports()
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it may end meanwhile
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(entry.readlink())
                    if target.startswith("socket:[") and target[8:-1] in ports:
                        found.append(End(pid, int(entry.name), *ports[target[8:-1]]))
    return found


def between(victim: int, others: Collection[int]) -> list[End]:
    """Both ends of every connection between a process and others, and the victim's sockets that listen for them."""
    ours, theirs = ends([victim]), ends(others)
    pairs = {(end.far, end.near) for end in theirs if end.far}
    mine = [end for end in ours if (end.near, end.far) in pairs]
    matched = {(end.far, end.near) for end in mine}
    listened = {end.near for end in mine}
    return [
        *mine,
        *(end for end in theirs if (end.near, end.far) in matched),
        *(end for end in ours if not end.far and end.near in listened),
    ]


def partition(victim: int, others: Collection[int], seconds: float) -> int:
    """Let nothing through between a process and others for a while, new connections included; how many sockets that took."""
    dropped: dict[End, socket.socket] = {}
    deadline = time.monotonic() + seconds
    program = ctypes.create_string_buffer(RETURN_NOTHING)
    try:
        while time.monotonic() < deadline:
            for end in between(victim, others):
                if end not in dropped and (borrowed := _borrow(end)) is not None:
                    borrowed.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
                    dropped[end] = borrowed
            time.sleep(RESCAN_S)
    finally:
        for borrowed in dropped.values():
            borrowed.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, 0)
            borrowed.close()
    return len(dropped)


def corrupt(victim: int, others: Collection[int], chance: random.Random) -> int:
    """Write noise into every connection between a process and others, in both directions; into how many sockets it went."""
    hit = 0
    for borrowed in _borrowed(end for end in between(victim, others) if end.far):
        with contextlib.suppress(OSError):  # the other end may have had enough already
            borrowed.send(chance.randbytes(NOISE_BYTES), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            hit += 1
        borrowed.close()
    return hit


def can_borrow() -> bool:
    """Whether this system lets a process borrow sockets of those that it started."""
    with socket.socket() as probe:
        borrowed = _borrow(End(os.getpid(), probe.fileno(), 0, 0))
        if borrowed is None:
            return False
        borrowed.close()
        return True


def _borrowed(found: Iterable[End]) -> list[socket.socket]:
    return [borrowed for end in found if (borrowed := _borrow(end)) is not None]


def _borrow(end: End) -> socket.socket | None:
    """The socket itself, under a number of our own; None if its owner or the socket is gone."""
    try:
        process = os.pidfd_open(end.pid)
    except OSError:
        return None
    try:
        number = _libc.syscall(PIDFD_GETFD, process, end.fd, 0)
    finally:
        os.close(process)
    return None if number < 0 else socket.socket(fileno=number)


def _ports() -> dict[str, tuple[int, int]]:
    """(own port, other port) of every TCP socket that is connected or listens, by inode."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] in ("01", "0A"):
                found[fields[9]] = (int(fields[1].rpartition(":")[2], 16), int(fields[2].rpartition(":")[2], 16))
    return found
