"""From nothing to ready and back to nothing, with the embedded model and with what cannot work."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
from helpers.servers import Server
from helpers.tiny_model import save_tiny_model


def test_the_embedded_model_serves_and_ctrl_c_drains(tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--no-profile", "--drain-s", "60")
    text: list[str] = []

    def read() -> None:
        body = {"messages": [{"role": "user", "content": "Count to forty."}], "max_tokens": 60, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"ignore_eos": True}, timeout=60) as response:
            text.extend(line for line in response.iter_lines() if line)

    try:
        server.wait()
        log = server.log.read_text()
        for part in (
            "effective configuration",
            "* drain_s",
            "KV capacity: ",
            f"ready in {log.split('ready in ')[1].split()[0]} s: {server.url} ",
        ):
            assert part in log
        assert log.count("ready in") == 1
        thread = threading.Thread(target=read)
        thread.start()
        while not sum(server.metrics("dspark_num_requests_running").values()):
            time.sleep(0.02)
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does: everybody in the foreground gets it
        deadline = time.monotonic() + 10
        while (refused := server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})).status_code == 200:
            assert time.monotonic() < deadline
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        thread.join(60)
        assert text[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in text[:-1]]
        assert events[-1]["choices"][0]["finish_reason"] == "length", "the stream was not cut"
        assert server.stop() == 0
        assert server.processes() == {}
        assert "draining: " in server.log.read_text()
    finally:
        server.stop(signal.SIGKILL)


def test_a_port_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(tmp_path / "log", env={"DSPARK_PORT": str(port)}, port=port)
        assert server.process.wait(30) != 0
    log = server.log.read_text()
    assert f"port {port}" in log
    assert "in use" in log
    assert "Traceback" not in log
    assert server.processes() == {}


def test_a_signal_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path / "log", str(save_tiny_model(tmp_path / "tiny")))
    deadline = time.monotonic() + 60
    while not any("raylet" in command for command in server.processes().values()):
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)
    server.stop(signal.SIGTERM)
    assert server.processes() == {}
    assert "Traceback" not in server.log.read_text()


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    server = Server(tmp_path / "log", str(folder))
    assert server.process.wait(90) != 0
    log = server.log.read_text()
    assert str(folder) in log
    assert "Traceback" not in log
    assert server.processes() == {}
