"""Host work beside the engine's own thread: the overlapped driver hands it what the next forward does not wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class Aside:
    """Runs jobs in order on one thread. A job that raises is raised again by the next ``run`` or ``wait``, once."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._num_queued = self._num_done = 0  # each is counted by one thread alone

    @property
    def is_idle(self) -> bool:
        """Whether every job so far is done; for the thread that runs them."""
        return self._num_queued == self._num_done

    def run(self, job: Job) -> None:
        """Queue a job; the thread starts with the first one."""
        self._raise_failure()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="engine-aside", daemon=True)
            self._thread.start()
        self._num_queued += 1
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when every job so far is done."""
        if self._thread is not None and self._thread is not threading.current_thread():
            done = threading.Event()
            self._num_queued += 1
            self._jobs.put(done.set)
            done.wait()
        self._raise_failure()

    def close(self) -> None:
        """Finish the jobs and end the thread; a later ``run`` starts another one."""
        if self._thread is not None:
            self._jobs.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as failure:  # noqa: BLE001 - raised on the engine's thread
                self._failure = failure
            self._num_done += 1

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
