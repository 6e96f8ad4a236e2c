"""``serve run deploy/*.yaml``: each file, as it is but for the port, starts and answers with the embedded model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from helpers.servers import ROOT, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

START_S = 300.0


def environment(text: str) -> dict[str, str]:
    """What the file's own comment exports."""
    lines = [line.partition("export ")[2].partition("#")[0] for line in text.splitlines() if line.startswith("#   export ")]
    return dict(setting.split("=", 1) for line in lines for setting in line.split())


@pytest.mark.parametrize("topology", ["colocated", "disaggregated"])
def test_a_serve_file_starts_and_answers(tmp_path: Path, topology: str) -> None:
    text = (ROOT / "deploy" / f"{topology}.yaml").read_text()
    port = free_port()
    assert text.count("port: 8000") == 1
    (file := tmp_path / "serve.yaml").write_text(text.replace("port: 8000", f"port: {port}"))
    settings = environment(text)
    assert len(settings) >= 5
    log = (tmp_path / "log").open("w+")
    command = [str(Path(sys.executable).parent / "serve"), "run", "--address", "local", str(file)]
    settings |= {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, Path(log.name))
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24, "temperature": 0}
        for more in ({}, {"speculation": "off"}):  # in bf16 the two texts may differ: steps of other sizes round otherwise
            answer = httpx.post(f"{url}/v1/chat/completions", json=body | more, timeout=120).json()
            assert answer["choices"][0]["message"]["content"].strip()
            assert 0 < answer["usage"]["completion_tokens"] <= 24
        status = httpx.get(f"{url}/status").json()
        assert [verifier["state"] for verifier in status["verifiers"]] == ["ok"]
        assert len(status["draft_workers"]) == (topology == "disaggregated")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
