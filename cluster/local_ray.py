"""A Ray of our own on this machine, with Serve and the application in it: from nothing to ready, and back to nothing."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from dspark.cluster.app import APP_NAME, QUIET, build
from dspark.cluster.edge import IMPORT_PATH, IMPORT_PATH_ENV, MAX_BODY_ENV
from dspark.cluster.processes import adopt_orphans, bounded, descendants, end_descendants, process_name
from dspark.cluster.progress import ERROR_MARK, Progress
from dspark.config import ServeConfig
from dspark.errors import ConfigError, DSparkError

POLL_S: Final = 0.1
OBJECT_STORE_BYTES: Final = 128 * 2**20  # tokens go over gRPC; Serve itself needs next to nothing
# Read by Ray's processes when they start, not by this one, which has imported Ray already. The first three halve the CPU
# time of a chunk between router and proxy (docs/adr/002-token-path.md).
RAY_DEFAULTS: Final = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**30),  # whole responses with log-probabilities can be large
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a process that stands still cannot drain, and holds its GPU until it is killed
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # a tenth of a second would cost 2 % of a core for nothing
    # A connection that swallows what comes is found in 40 s instead of 7 minutes; servers allow pings as often as the first one says.
    "RAY_grpc_client_keepalive_time_ms": "20000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    "RAY_worker_niceness": "0",  # Ray runs workers at 15: any other process of the machine would starve the engine
    "RAY_USAGE_STATS_ENABLED": "0",
}
SHUTDOWN_S: Final = 20.0  # for Serve, and again for Ray
LEFTOVER_S: Final = 5.0  # for processes that outlive Ray's own shutdown
ASK_S: Final = 5.0

_log = logging.getLogger(__name__)


class LocalServer:
    """Ray and Serve from ``with`` to its end; one at a time in a process."""

    def __init__(self, config: ServeConfig, show_dashboard: bool, say: Callable[[str], None]) -> None:
        self._config = config
        self._show_dashboard = show_dashboard
        self._say = say
        self._stop = StopSignal()
        self._started: list[Callable[[], None]] = []
        self._spare: set[int] = set()

    def __enter__(self) -> LocalServer:
        """Start Ray, and Serve's proxy on the configured port."""
        os.environ[IMPORT_PATH_ENV] = IMPORT_PATH
        os.environ[MAX_BODY_ENV] = str(self._config.max_body_bytes)
        for name, value in RAY_DEFAULTS.items():
            os.environ.setdefault(name, value)
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self._say("starting Ray")
        self._spare = descendants()
        adopt_orphans()
        self._stop.install()
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def deploy(self) -> dict[str, Any] | None:
        """Deploy, and wait until ``/health`` counts every verifier; the effective settings of one, or None after a signal."""
        target = serve.RunTarget(build(self._config), name=APP_NAME, route_prefix="/", logging_config=QUIET)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        shown: dict[str, int] = {}
        while not self._stop.is_asked:
            self._show_progress(shown)
            application = serve.status().applications.get(APP_NAME)
            if application is not None and application.status is ApplicationStatus.DEPLOY_FAILED:
                raise DSparkError(f"the application could not be deployed: {application.message}")
            if application is not None and application.status is ApplicationStatus.RUNNING and self._is_healthy():
                return self._describe()
            time.sleep(POLL_S)
        return None

    def _describe(self) -> dict[str, Any]:
        """The effective settings of one verifier, and under ``draft_worker`` those of one draft worker, if there are any."""
        described: dict[str, Any] = serve.get_deployment_handle("Verifier", APP_NAME).describe.remote().result()["described"]
        if self._config.topology == "disaggregated":
            report = serve.get_deployment_handle("DraftWorker", APP_NAME).report.remote().result()
            described["draft_worker"] = report["described"]
        return described

    def serve(self) -> None:
        """Return after a signal, when running requests have ended or may not run longer."""
        self._stop.wait()
        draining = threading.Thread(target=self._drain, daemon=True)
        draining.start()
        while draining.is_alive() and _ray_lives():  # the same signal may have reached Ray's daemons: then nothing answers
            draining.join(POLL_S)
        self._say("stopping")

    def _start(self) -> None:
        self._started.append(ray.shutdown)
        ray.init(
            address="local",
            include_dashboard=self._show_dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
        )
        self._stop.install()  # Ray has put its own handlers in place
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": self._config.host, "port": self._config.port, "request_timeout_s": None},
            logging_config=QUIET,
        )
        self._started.append(serve.shutdown)

    def _end(self) -> None:
        """Take down what was started, last first, in bounded time even if a signal to the process group killed half of it."""
        self._stop.install()
        lives = _ray_lives()
        limit_s = SHUTDOWN_S if lives else ASK_S
        steps = self._started[::-1] if lives else self._started[:1]
        # Ray prints about its own controller's end to our standard output, whatever its log level says
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for step in steps:
                _take_down(step, limit_s)
        if killed := end_descendants(self._spare, LEFTOVER_S if lives else 0.0):
            _log.warning("%d processes of Ray had to be killed", killed)
        self._stop.restore()

    def _show_progress(self, shown: dict[str, int]) -> None:
        """Print what replicas have reported since the last call; an error that ended a load is raised."""
        is_alone = self._config.num_verifiers == 1 and self._config.topology == "colocated"
        for name, lines in Progress.read().items():
            for line in lines[shown.get(name, 0) :]:
                if line.startswith(ERROR_MARK):
                    raise ConfigError(line.removeprefix(ERROR_MARK))
                self._say(line if is_alone else f"{name}: {line}")
            shown[name] = len(lines)

    def _is_healthy(self) -> bool:
        """Whether a router has a stream to every verifier, and all of them make progress."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._config.host, self._config.host)
        connection = http.client.HTTPConnection(host, self._config.port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            answer = json.loads(connection.getresponse().read())
            return bool(answer.get("healthy") == self._config.num_verifiers)
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()

    def _drain(self) -> None:
        """Refuse new requests, and wait for the running ones up to ``drain_s`` or a second signal."""
        router: DeploymentHandle[Any] = serve.get_deployment_handle("Router", APP_NAME)
        drain_s = self._config.drain_s
        try:
            router.broadcast("begin_drain").results(timeout_s=ASK_S, return_exceptions=True)
            deadline = time.monotonic() + drain_s
            said = False
            while not self._stop.is_hurried and time.monotonic() < deadline:
                counts = router.broadcast("in_flight").results(timeout_s=ASK_S, return_exceptions=True)
                running = sum(count for count in counts if isinstance(count, int))
                if not running:
                    break
                if not said:
                    said = True
                    self._say(f"draining: {running} requests still run, for at most {drain_s:g} s; once more Ctrl-C stops now")
                time.sleep(POLL_S)
        except (RayError, RayServeException, TimeoutError) as error:
            _log.warning("the routers cannot be asked to drain: %s", error)


class StopSignal:
    """The first SIGINT or SIGTERM asks for a drain, the second for an end at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._hurried = threading.Event()
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in self._before:
            signal.signal(number, self._take)

    def restore(self) -> None:
        """Leave the signals to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """Return after the first signal."""
        while not self._asked.wait(3600.0):
            pass

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    @property
    def is_hurried(self) -> bool:
        return self._hurried.is_set()

    def _take(self, number: int, frame: FrameType | None) -> None:
        (self._hurried if self._asked.is_set() else self._asked).set()


def _take_down(step: Callable[[], None], limit_s: float) -> None:
    try:
        is_done = bounded(step, limit_s)
    except Exception as error:  # noqa: BLE001 - a Ray that is half dead fails in many ways, and must end all the same
        _log.warning("%s failed: %s", step.__qualname__, error)
        return
    if not is_done:
        _log.warning("%s did not end within %g s", step.__qualname__, limit_s)
        atexit.unregister(ray.shutdown)  # it would be tried again when the interpreter ends, without a bound


def _ray_lives() -> bool:
    """Whether Ray's two daemons run below this process."""
    return {"raylet", "gcs_server"} <= {process_name(pid) for pid in descendants()}
