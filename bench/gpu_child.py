"""Processes that do one job each for ``dspark bench gpus``: settings in, results out, as JSON lines over their own pipes.

A process of its own for everything that is measured: what one leaves on a device, or breaks, is gone with it.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final

from dspark.errors import DSparkError

ANSWER_S: Final = 1800.0  # for a job's next result: a large model is loaded once for each rank
MODULE: Final = "dspark.bench.gpu_jobs"


class Child:
    """The parent's end of one process. As a context manager it ends the process whatever happens."""

    def __init__(self, job: str, **settings: Any) -> None:
        self.job = job
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        threads = {"OMP_NUM_THREADS": str(settings["threads"])} if settings.get("threads") else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1"} | threads,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.tell(job=job, **settings)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tell(self, **words: Any) -> None:
        """Send one line; DSparkError if the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise DSparkError(f"{self.job}: the process is gone") from error

    def hear(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The next result; DSparkError with what the process says if it fails, ends or takes too long."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise DSparkError(f"{self.job}: nothing came in {timeout_s:g} s") from None
        if not line:
            raise DSparkError(f"{self.job}: the process ended with exit code {self._process.wait()}")
        words: dict[str, Any] = json.loads(line)
        if "error" in words:
            raise DSparkError(f"{self.job}: {words['error']}")
        return words

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


class Talk:
    """The process's end. What libraries print goes to standard error; when the parent goes, so does the process."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._heard: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, **words: Any) -> None:
        """Send one result."""
        self._out.write(json.dumps(words) + "\n")
        self._out.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for the parent's next words."""
        words: dict[str, Any] = json.loads(self._heard.get())
        return words

    def _listen(self) -> None:
        for line in sys.stdin:
            self._heard.put(line)
        os._exit(0)  # the main thread may be in a transfer that nobody will complete


def serve_one_job(jobs: Mapping[str, Callable[..., None]]) -> int:
    """Do the job that the parent names first; the exit code."""
    talk = Talk()
    settings = talk.hear()
    try:
        jobs[settings.pop("job")](talk, **settings)
    except DSparkError as error:
        talk.say(error=str(error))
        return 1
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent reports it
        traceback.print_exc()
        talk.say(error=f"{type(error).__name__}: {error}")
        return 1
    return 0
