"""Joins the Ray cluster that was named, or starts one here; and ends what it started, whatever happens."""

import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cai_ray.errors import ResourceError

# More slots than cores: on a small machine roles take turns, and slots must never deadlock.
LOGICAL_CPUS = max(32, os.cpu_count() or 1)
STOP_GRACE_S = 5.0
# Imports this module anew, which is to end all at once: it knows nothing heavy.
_END = "from cai_ray.cluster import end_children; end_children(); raise SystemExit(130)"


def start_ray(address: str | None) -> None:
    """Joins the cluster at `config.Cluster.joined`; without an address starts one of this process's own.

    A cluster that happens to run on this machine is left alone.

    Raises:
        ResourceError: the address does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_usage_stats_enabled", "0")
    # Ray starts a worker per CPU slot ahead of time; with more slots than cores that alone would take half a minute.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any busy process starve the workers
    # A worker without work wakes a hundred times a second and takes 1% of a core; Ray keeps one a slot unless told.
    os.environ.setdefault("RAY_num_workers_soft_limit", "0")
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "5000")
    # No dashboard is there to read what Ray's processes measure, which took another 2% of a core.
    os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "600000")
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_event_stats", "0")
    import ray
    import ray.data

    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    own = {"num_cpus": LOGICAL_CPUS, "include_dashboard": False}
    mendable = (ConnectionError, ValueError, RuntimeError) if address else ()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **how, **({} if address else own))
    except mendable as e:
        reason, *_ = str(e).splitlines() or [type(e).__name__]
        raise ResourceError(
            f"no Ray cluster answers at {address}: {reason}",
            "check cluster.address or RAY_ADDRESS; without either a cluster is started on this machine",
        ) from e
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray's own handler exits with 15: back to ours
            signal.signal(signal.SIGTERM, handler)
    ray.data.DataContext.get_current().enable_progress_bars = False  # our own tell of rows, not of its operators
    for handler in logging.getLogger("ray.data").handlers:  # its log file, in Ray's session folder, has all it says
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", "`ray_remote_args` is")  # max_restarts, for which Ray Data has no other place
    if not address:
        # Nobody reads what the one would pass on, and reading every worker's log ten times a second takes 1% of a core;
        # the other adds nodes where a cluster has been told how, which this one has not.
        ray._private.worker._global_node.kill_log_monitor(check_alive=False)  # type: ignore[union-attr]
        ray._private.worker._global_node.kill_monitor(check_alive=False)  # type: ignore[union-attr]


def on_every_machine(function: Callable[..., Any], *args: Any, timeout_s: float) -> dict[str, Any]:
    """What `function(*args)` returns on each machine of the cluster, by the machine's name.

    Raises:
        ResourceError: one did not answer in time, or cannot import cai_ray.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}
    call = ray.remote(num_cpus=0, max_retries=0)(function)
    there = [call.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, False)).remote(*args) for n in nodes]
    try:
        return dict(zip(nodes.values(), ray.get(there, timeout=timeout_s), strict=True))
    except RayError as e:
        what = f"a machine of {', '.join(nodes.values())} did not run a small task: {type(e).__name__}"
        raise ResourceError(what, "install cai-ray on each, in the environment that Ray was started in") from e


@contextmanager
def stops_on_interrupt(farewell: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end this process within seconds, with everything it started; the exit code is 130.

    Nothing needs a slower goodbye: every file that counts is written atomically, so an interrupt is no different from
    a power cut. Ray's processes are our children (or the cluster ends our job when we are gone).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with suppress(OSError, SystemExit):  # nobody reads any more: Ctrl-C has ended the `tee` behind us too
                farewell()
                sys.stdout.flush()
                sys.stderr.flush()
            # As another program: a thread of Ray's in this one ends it, with exit code 1, once it misses the raylet.
            os.execv(sys.executable, [sys.executable, "-c", _END])
        finally:
            os._exit(130)

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def end_children() -> None:
    """Ends every process below this one and removes the shared memory that they leave behind."""
    import psutil

    alive = psutil.Process().children(recursive=True)
    pids = {str(c.pid) for c in alive} | {str(os.getpid())}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in alive:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        _, alive = psutil.wait_procs(alive, timeout=STOP_GRACE_S)
    # Named cai-ray-PID-SPACE: containers that share the memory number processes each anew (generation.shared_memory).
    for path in Path("/dev/shm").glob(f"cai-ray-*-{Path('/proc/self/ns/pid').stat().st_ino}"):
        if path.name.split("-")[2] in pids:
            shutil.rmtree(path, ignore_errors=True)
