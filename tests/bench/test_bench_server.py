"""The server that a comparison starts: awaited, and gone afterwards whatever happens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from dspark.bench import server_process
from dspark.bench.server_process import free_port, running, serve_command
from dspark.errors import ConfigError

SERVER = """
import http.server, os, pathlib, signal, sys
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(sys.argv[3])); self.send_header("Content-Length", "0"); self.end_headers()
print("loading", flush=True)
if sys.argv[4:] == ["stubborn"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_alive(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


BENCH = """
import argparse, sys, time
from dspark.bench import cli
from dspark.bench.server_process import running
def run(args):
    with running(sys.argv[2:], sys.argv[1], 30.0):
        print("measuring", flush=True)
        time.sleep(60.0)
class Parser(argparse.ArgumentParser):
    def parse_args(self, argv):
        return argparse.Namespace(run=run)
cli.make_parser = lambda commands: Parser()
cli.main([])
"""


def command(port: int, pid_file: Path, status: int = 200, *more: str) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), str(pid_file), str(status), *more]


def test_a_server_runs_for_the_length_of_a_block(tmp_path: Path) -> None:
    port, pid_file = free_port(), tmp_path / "pid"
    with running(command(port, pid_file), f"http://127.0.0.1:{port}", 30.0):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
            assert response.status == 200
        assert is_alive(pid_file)
    assert not is_alive(pid_file)


def test_a_server_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "STOP_S", 0.5)
    port, pid_file = free_port(), tmp_path / "pid"
    with running(command(port, pid_file, 200, "stubborn"), f"http://127.0.0.1:{port}", 30.0):
        assert is_alive(pid_file)
    assert not is_alive(pid_file)


def test_a_server_that_ends_shows_why() -> None:
    with (
        pytest.raises(ConfigError, match=r"status 3:\nno such model"),
        running([sys.executable, "-c", "print('no such model'); raise SystemExit(3)"], f"http://127.0.0.1:{free_port()}", 30.0),
    ):
        raise AssertionError("the block must not run")


def test_a_server_that_is_never_healthy(tmp_path: Path) -> None:
    port, pid_file = free_port(), tmp_path / "pid"
    with (
        pytest.raises(ConfigError, match=r"not healthy after 2 s:\nloading"),
        running(command(port, pid_file, 503), f"http://127.0.0.1:{port}", 2.0),
    ):
        raise AssertionError("the block must not run")
    assert not is_alive(pid_file)


def test_free_port_and_command() -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
    arguments = ["-m", "dspark", "serve", "folder", "--port", "8123", "--drafter", "ngram"]
    assert serve_command("folder", 8123, ["--drafter", "ngram"]) == [sys.executable, *arguments]
    assert serve_command(None, 8123, [])[1:] == ["-m", "dspark", "serve", "--port", "8123"]


def test_a_measurement_that_is_told_to_end_takes_its_server_along(tmp_path: Path) -> None:
    port, pid_file = free_port(), tmp_path / "pid"
    arguments = [f"http://127.0.0.1:{port}", *command(port, pid_file)]
    with subprocess.Popen([sys.executable, "-c", BENCH, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == b"measuring\n"
        bench.terminate()
        assert bench.wait(30.0) != 0
    assert not is_alive(pid_file)
