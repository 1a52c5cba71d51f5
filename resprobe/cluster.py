"""Many runs on many machines: the missing runs of a sweep, each a task of a Ray cluster.

    python -m studies.degradation --preset paper --executor ray --address HOST:6379 --runs /shared/runs

All nodes share the folder of runs. So a run that a lost node had begun goes on elsewhere from its last checkpoint, and
the machine that asked finds what the others trained as it finds its own. Ray is imported when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import platform
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from resprobe.board import ProgressBoard
from resprobe.devices import deterministic, prepare_cpu
from resprobe.errors import StorageError, UsageError, not_accepted, one_line
from resprobe.extensions import load_plugin
from resprobe.files import write_atomically
from resprobe.runs import RunStore, configure
from resprobe.sweep import Job, train_job

_LOSSES = 3
"""A run that lost its process so many times without having got on in between is given up."""
_LATE = 90.0
"""Seconds until what another machine wrote must be seen; NFS believes for up to 60 that a file is not there."""
_PATIENCE = 60.0
"""Seconds that interrupted runs have to write their checkpoints."""


@dataclass(frozen=True)
class RayCluster:
    """A cluster as a sweep needs it. `device`: what the runs are trained on. `sizes`: the CPUs of each node, or its GPUs
    where these are the device. `threads`: CPUs for each of these."""

    device: torch.device
    sizes: tuple[int, ...]
    threads: int

    @property
    def here(self) -> torch.device:
        """What this machine has of that, for what is to be done after the training."""
        return self.device if torch.cuda.is_available() else torch.device("cpu")

    @property
    def name(self) -> str:
        """The cluster in words: where the runs are trained."""
        return f"a Ray cluster with {sum(self.sizes)} {self._resource}s on {len(self.sizes)} nodes"

    @property
    def _resource(self) -> str:
        return _RESOURCES[self.device.type]

    def share(self, runs: int, concurrency: int | None) -> tuple[int, int, float]:
        """How many of so many runs are trained at a time, and the threads and the CPUs or GPUs of each.

        `concurrency`: runs a GPU, or runs on the smallest node where CPUs train; None: one a GPU, one a core. Fewer
        runs than that spread over all GPUs or nodes.
        """
        if self._resource == "GPU":
            each = min(concurrency or 1, math.ceil(runs / sum(self.sizes)))
            amount, threads = 1 / max(1, each), self.threads // max(1, each)
        else:
            cores = min(self.sizes)
            each = max(1, min(concurrency or cores, math.ceil(runs / len(self.sizes))))
            amount = threads = cores // each or cores / each
        # Ray counts in ten-thousandths, and three rounded thirds must not be more than a whole.
        amount = math.floor(amount * 10_000) / 10_000
        return min(runs, sum(int(size / amount) for size in self.sizes)), max(1, int(threads)), amount

    def train(
        self,
        jobs: Sequence[Job],
        store: RunStore,
        concurrency: int | None,
        plugins: Sequence[str],
        board: ProgressBoard,
    ) -> None:
        """Trains `jobs` on the nodes; `board` is told of each.

        A lost node or a killed process is no failure: its run begins again from its last checkpoint. Raises
        `UsageError` if a node cannot train as this machine would.
        """
        import ray
        from ray import cloudpickle
        from ray.exceptions import RayError, RayTaskError
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        _, threads, amount = self.share(len(jobs), concurrency)
        # On a GPU the cores do little; they must not keep runs from it.
        resources = {"num_cpus": amount} if self._resource == "CPU" else {"num_cpus": 0, "num_gpus": amount}
        task = ray.remote(max_retries=0, scheduling_strategy="SPREAD", **resources)(_train_on_node)
        # News are lost with the node that keeps them, so that is this one.
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node})
        listener = threading.Thread(target=_listen, args=(news, board), daemon=True)
        listener.start()
        losses = _Losses(store)
        with _marker(store) as marker:
            determinism_mode = torch.get_deterministic_debug_mode()
            place = _Place(os.getcwd(), marker, str(self.device), threads, tuple(plugins), determinism_mode)

            def begin(job: Job) -> Any:
                # Pickled here, since what a plugin defines can be read only after the plugin is loaded.
                return task.remote(place, job.config.key, cloudpickle.dumps(job), news)

            pending = {begin(job): job for job in jobs}
            try:
                while pending:
                    for ended in ray.wait(list(pending))[0]:
                        job = pending.pop(ended)
                        failure: Exception | None
                        try:
                            metrics = ray.get(ended)
                            failure = _not_seen(job, store)
                        except RayTaskError as error:  # raised by the training itself
                            failure = error.cause
                        except RayError as error:  # its node or its process is gone
                            failure = losses.count(job, board.names[job.config.key], error)
                            if failure is None:
                                pending[begin(job)] = job
                                continue
                        if failure is None:
                            board.finished(job, metrics)
                        elif isinstance(failure, UsageError):
                            raise failure from None
                        else:
                            board.failed(job, str(failure))
            except BaseException:
                for left in reversed(pending):  # first what waits for its turn, else it would be begun
                    ray.cancel(left)
                ray.wait(list(pending), num_returns=len(pending), timeout=_PATIENCE)
                raise
            finally:
                with contextlib.suppress(RayError):  # nobody need hear of it if the news have died
                    news.put(None)
                    listener.join(timeout=5)
                    news.shutdown()


_RESOURCES = {"cuda": "GPU", "cpu": "CPU"}


@contextlib.contextmanager
def ray_cluster(address: str = "", device: str = "auto") -> Iterator[RayCluster]:
    """The Ray cluster at `address` (HOST:PORT), of which this machine must be a node, until the context is left.

    Without an address: the one this process has joined, else that of RAY_ADDRESS, else the one that runs on this
    machine, else a new one of this machine alone. `device` "auto" is the nodes' GPUs if they have any, else their CPUs.
    Raises `UsageError` where there is no Ray, no cluster or no such device.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("executor (='ray') trains a run in one process; under torchrun it must be 'local'")
    try:
        import ray
    except ImportError:
        raise UsageError("executor (='ray') needs Ray, which is not installed: pip install 'resprobe[ray]'") from None
    joined = not ray.is_initialized()
    if joined:
        _join(ray, address)
    try:
        yield _look_at(ray.nodes(), device)
    finally:
        if joined:
            ray.shutdown()


def _join(ray: ModuleType, address: str) -> None:
    asked = address or os.environ.get("RAY_ADDRESS", "")
    accepted = "accepted: HOST:PORT of a running cluster, auto, local"
    try:
        if asked not in ("", "auto", "local"):
            # Ray itself takes half a minute and many lines to say that nobody is there.
            host, _, port = asked.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # older Rays announce a change that is nothing to us
            ray.init(asked or None, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        why = one_line(error.__cause__ or error)
        raise UsageError(f"address (={asked!r}) cannot be joined: {why}; {accepted}") from error


def _look_at(nodes: Sequence[dict[str, Any]], device: str) -> RayCluster:
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    offered = [kind for kind, what in _RESOURCES.items() if any(each.get(what, 0) >= 1 for each in resources)]
    if device not in ("auto", *_RESOURCES):
        raise not_accepted("device", device, ("auto", *_RESOURCES))
    if not offered or device not in ("auto", *offered):
        raise UsageError(f"device (={device!r}) is not available: no node of the Ray cluster offers it")
    kind = offered[0] if device == "auto" else device
    fit = [each for each in resources if each.get(_RESOURCES[kind], 0) >= 1]
    sizes = tuple(int(each[_RESOURCES[kind]]) for each in fit)
    threads = min(int(each.get("CPU", 1) / size) for each, size in zip(fit, sizes, strict=True))
    return RayCluster(torch.device(kind), sizes, threads)


class _Losses:
    """Counts how often runs lost their node or process, and says when that is enough."""

    def __init__(self, store: RunStore):
        self.store = store
        self.counts: dict[str, tuple[int, int]] = {}

    def count(self, job: Job, name: str, error: Exception) -> Exception | None:
        """Nothing if the run is to be begun again, else what to report of it."""
        why = one_line(error).partition(". ")[0]
        done = self.store.iterations_done(job.config)
        before, count = self.counts.get(job.config.key, (done, 0))
        # Machines that are taken away now and then must not end a run that gets on.
        count = count + 1 if done <= before else 1
        self.counts[job.config.key] = done, count
        if count == _LOSSES:
            return RuntimeError(f"lost {count} times at iteration {done}: {why}")
        lost = f"it lost its process ({count} of {_LOSSES} times at this iteration)"
        warnings.warn(f"{name} goes on from iteration {done} where there is room, since {lost}: {why}")
        return None


def _not_seen(job: Job, store: RunStore) -> Exception | None:
    """Waits until the run that another machine has written is seen here."""
    deadline = time.monotonic() + _LATE

    def seen() -> bool:
        with contextlib.suppress(StorageError):  # of a folder that is away for a moment
            return store.find(job.config, job.probes) is not None
        return False

    while not seen():
        if time.monotonic() > deadline:
            return RuntimeError(
                f"{store.folder(job.config)} was written by another machine and is not seen on this one"
            )
        time.sleep(0.5)
    return None


@contextlib.contextmanager
def _marker(store: RunStore) -> Iterator[Path]:
    """A file by which a node knows the folder of runs for ours."""
    path = store.root.absolute() / f".shared-{uuid.uuid4().hex}"
    write_atomically(path, b"")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _listen(news: Any, board: ProgressBoard) -> None:
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):
        while (item := news.get()) is not None:
            key, said = pickle.loads(item)
            if isinstance(said, str):
                warnings.warn(said)
            else:
                board.tell(key, said)


# -- on the node -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """What a node needs to train as the machine that asks would. `folder`: where its relative paths begin.
    `determinism_mode`: as for a process of `sweep`."""

    folder: str
    marker: Path
    device: str
    threads: int
    plugins: tuple[str, ...]
    determinism_mode: int

    def receive(self, key: str, packed: bytes) -> tuple[Job, RunStore]:
        """The job, and the folder its run is kept in. Raises `UsageError` if this would not be the run of that key."""
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        root = self.marker.parent
        if not self.marker.is_file():
            raise UsageError(f"runs (={str(root)!r}) must be a folder that all nodes share, at the same path")
        for plugin in self.plugins:
            load_plugin(plugin)
        from ray import cloudpickle

        job: Job = cloudpickle.loads(packed)
        asked = job.config
        network = asked.network if job.network is None else job.network
        ours = configure(network, asked.data, asked.recipe, seed=asked.seed, precision=asked.precision)
        if ours.key != key:
            raise UsageError(
                f"{asked.folder_name} would be another run here: resprobe, plugins and data must be the same everywhere"
            )
        return job, RunStore(root)


def _train_on_node(place: _Place, key: str, packed: bytes, news: Any) -> dict[str, float]:
    def tell(said: object) -> None:
        # Sent and forgotten: Ray would begin another run on the cores of one that waits for an answer. Pickled, so that
        # the queue need not import torch to pass it on.
        news.actor.put_nowait.remote(pickle.dumps((key, said)))

    prepare_cpu()
    torch.set_num_threads(place.threads)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: tell(str(message))
        try:
            job, store = place.receive(key, packed)
            with deterministic(place.determinism_mode > 0, warn_only=place.determinism_mode == 1):
                return train_job(job, store, torch.device(place.device), tell)
        except UsageError as error:
            raise type(error)(f"{error} (on node {platform.node()})") from error
        except Exception as error:  # here, where it is known in which line it arose
            raise RuntimeError(one_line(error)) from error
