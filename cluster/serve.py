"""``dspark serve``: a local Ray with routers and verifiers in it, from nothing to ready and back to nothing."""

from __future__ import annotations

import atexit
import contextlib
import errno
import http.client
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from dspark.cluster.app import APP_NAME, QUIET, build_colocated
from dspark.cluster.edge import IMPORT_PATH, IMPORT_PATH_ENV, MAX_BODY_ENV
from dspark.cluster.processes import adopt_orphans, bounded, descendants, end_descendants, process_name
from dspark.cluster.verifier import ERROR_MARK, Progress
from dspark.config import EngineConfig, ServeConfig
from dspark.config_file import effective
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
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # a tenth of a second would cost 2 % of a core for nothing
    "RAY_worker_niceness": "0",  # Ray runs workers at 15: any other process of the machine would starve the engine
    "RAY_USAGE_STATS_ENABLED": "0",
}
SHUTDOWN_S: Final = 20.0  # for Serve, and again for Ray
LEFTOVER_S: Final = 5.0  # for processes that outlive Ray's own shutdown
ASK_S: Final = 5.0

_log = logging.getLogger(__name__)


def serve_forever(config: ServeConfig, show_dashboard: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, then drain and leave no process behind. A second signal ends the drain.

    Raises ``ConfigError`` before anything is started if the port is taken or the model cannot be prepared, and the
    engine's own error if it cannot be loaded.
    """
    started = time.monotonic()
    config = _with_threads(config)
    check_port(config.host, config.port)
    if config.engine.model is None:
        from dspark.deploy.default_model import default_cache, prepare

        prepare(default_cache(), _say)
    stop = _StopSignal()
    with stop.installed(), _local_ray(config, show_dashboard, stop):
        handles = _deploy(config, stop)
        if handles is None:
            return
        router, verifier = handles
        for line in summary(config, verifier.describe.remote().result()["described"]):
            _say(line)
        docs = f" (docs: {url(config)}/docs)" if config.show_docs else ""
        _say(f"ready in {time.monotonic() - started:.0f} s: {url(config)}{docs}")
        stop.wait()
        draining = threading.Thread(target=_drain, args=(router, config.drain_s, stop), daemon=True)
        draining.start()
        while draining.is_alive() and _ray_lives():  # the same signal may have reached Ray's daemons: then nothing answers
            draining.join(POLL_S)
        _say("stopping")


def url(config: ServeConfig) -> str:
    """Where clients on this machine find the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    return f"http://{host}:{config.port}"


def check_port(host: str, port: int) -> None:
    """ConfigError if the port cannot be bound now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise ConfigError(f"port {port} on {host} {reason}; choose another with --port or DSPARK_PORT") from error


def summary(config: ServeConfig, described: dict[str, Any]) -> list[str]:
    """The effective configuration, one line a key (``*``: set by the user), and the KV capacity."""
    engine = config.engine.model_copy(update={key: described[key] for key in EngineConfig.model_fields if key in described})
    chosen = effective(config)
    resolved = effective(config.model_copy(update={"engine": engine}))
    width = max(len(setting.path) for setting in chosen)
    lines = ["effective configuration (* set by you):"]
    lines += [f"{' ' if given.is_default else '*'} {given.path:<{width}}  {now.value}" for given, now in zip(chosen, resolved, strict=True)]
    tokens, requests = described["kv_capacity_tokens"], described["kv_capacity_requests"]
    longest = described["max_model_len"]
    lines.append(f"KV capacity: {tokens} tokens, {requests} requests of the full {longest} tokens ({config.num_verifiers} x this)")
    return lines


class _StopSignal:
    """The first SIGINT or SIGTERM asks for a drain, the second for an end at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._hurried = threading.Event()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals; Ray installs handlers of its own, so ``install`` is called again after it."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        (self._hurried if self._asked.is_set() else self._asked).set()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    @property
    def is_hurried(self) -> bool:
        return self._hurried.is_set()

    def wait(self) -> None:
        while not self._asked.wait(3600.0):
            pass


@contextlib.contextmanager
def _local_ray(config: ServeConfig, show_dashboard: bool, stop: _StopSignal) -> Iterator[None]:
    """A Ray of our own on the loopback interface, with Serve's proxy on the configured port; all of it ends with the block."""
    os.environ[IMPORT_PATH_ENV] = IMPORT_PATH
    os.environ[MAX_BODY_ENV] = str(config.max_body_bytes)
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _say("starting Ray")
    mine_before = descendants()
    adopt_orphans()
    started: list[Callable[[], None]] = []
    try:
        started.append(ray.shutdown)
        ray.init(
            address="local",
            include_dashboard=show_dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
        )
        stop.install()
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port, "request_timeout_s": None},
            logging_config=QUIET,
        )
        started.append(serve.shutdown)
        yield
    finally:
        stop.install()  # Ray may have put its own handlers in place and been interrupted by them
        _end_ray(started, mine_before)


def _end_ray(started: list[Callable[[], None]], spare: set[int]) -> None:
    """Take down what was started, last first, in bounded time even if a signal to the process group has killed half of it."""
    lives = _ray_lives()
    limit_s = SHUTDOWN_S if lives else ASK_S
    steps = started[::-1] if lives else started[:1]
    # Ray prints about its own controller's end to our standard output, whatever its log level says
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for step in steps:
            try:
                is_done = bounded(step, limit_s)
            except Exception as error:  # noqa: BLE001 - a Ray that is half dead fails in many ways, and must end all the same
                _log.warning("%s failed: %s", step.__qualname__, error)
            else:
                if not is_done:
                    _log.warning("%s did not end within %g s", step.__qualname__, limit_s)
                    atexit.unregister(ray.shutdown)  # it would be tried again when the interpreter ends, without a bound
    if killed := end_descendants(spare, LEFTOVER_S if lives else 0.0):
        _log.warning("%d processes of Ray had to be killed", killed)


def _ray_lives() -> bool:
    """Whether Ray's two daemons run below this process."""
    return {"raylet", "gcs_server"} <= {process_name(pid) for pid in descendants()}


def _deploy(config: ServeConfig, stop: _StopSignal) -> tuple[DeploymentHandle[Any], DeploymentHandle[Any]] | None:
    """Deploy and wait for ``/health`` to say 200; None if a signal came first."""
    target = serve.RunTarget(build_colocated(config), name=APP_NAME, route_prefix="/", logging_config=QUIET)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    shown: dict[str, int] = {}
    while not stop.is_asked:
        _show_progress(shown, config.num_verifiers > 1)
        application = serve.status().applications.get(APP_NAME)
        if application is not None and application.status is ApplicationStatus.DEPLOY_FAILED:
            raise DSparkError(f"the application could not be deployed: {application.message}")
        if application is not None and application.status is ApplicationStatus.RUNNING and _is_healthy(config):
            return serve.get_deployment_handle("Router", APP_NAME), serve.get_deployment_handle("Verifier", APP_NAME)
        time.sleep(POLL_S)
    return None


def _show_progress(shown: dict[str, int], names_replicas: bool) -> None:
    """Print what verifiers have reported since the last call; an error that ended a load is raised."""
    for replica_id, lines in Progress.read().items():
        for line in lines[shown.get(replica_id, 0) :]:
            if line.startswith(ERROR_MARK):
                raise ConfigError(line.removeprefix(ERROR_MARK))
            _say(f"verifier {replica_id}: {line}" if names_replicas else line)
        shown[replica_id] = len(lines)


def _is_healthy(config: ServeConfig) -> bool:
    host = url(config).removeprefix("http://").rpartition(":")[0].strip("[]")
    connection = http.client.HTTPConnection(host, config.port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _drain(router: DeploymentHandle[Any], drain_s: float, stop: _StopSignal) -> None:
    """Refuse new requests, and wait for the running ones up to ``drain_s`` or a second signal."""
    try:
        router.broadcast("begin_drain").results(timeout_s=ASK_S, return_exceptions=True)
        deadline = time.monotonic() + drain_s
        said = False
        while not stop.is_hurried and time.monotonic() < deadline:
            counts = router.broadcast("in_flight").results(timeout_s=ASK_S, return_exceptions=True)
            running = sum(count for count in counts if isinstance(count, int))
            if not running:
                break
            if not said:
                said = True
                _say(f"draining: {running} requests still run, for at most {drain_s:g} s; once more Ctrl-C stops now")
            time.sleep(POLL_S)
    except (RayError, RayServeException, TimeoutError) as error:
        _log.warning("the routers cannot be asked to drain: %s", error)


def _with_threads(config: ServeConfig) -> ServeConfig:
    """OMP_NUM_THREADS of this shell becomes the engine's thread count; inside Ray the variable means something else."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if config.engine.threads is not None or not value.isdigit() or int(value) < 1:
        return config
    return config.model_copy(update={"engine": config.engine.model_copy(update={"threads": int(value)})})


def _say(text: str) -> None:
    print(text, flush=True, file=sys.stdout)
