"""Engines that run batches: processes of this machine, or actors of a Ray cluster. Whoever is idle gets the next one.

An engine yields `Painted` for each batch in the order of finishing, and `Step` in between. A worker that dies loses
its batch, not the run: the batch is given out again, job by job if it had several, so that a job that kills its worker
stands alone in the end and is given up after `TRIES`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import platform
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from .batch import Painted, Painter
from .jobs import Batch

__all__ = ["Step", "local", "ray_cluster"]

TRIES = 3

#: Workers that die one after the other before any finishes a batch.
_DEATHS = 6

_STEP_SECONDS = 0.2

#: How a client of HTTP/2, which Ray's services speak, begins: the preface and no settings. The server's are frames of
#: type 4.
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@dataclasses.dataclass(frozen=True)
class Step:
    """How far a worker's batch is; `total` 0: the worker has died, and `reason` says of what."""

    worker: str
    done: int
    total: int
    jobs: int = 0
    reason: str = ""


class _Queue:
    """Batches to give out. Parts of one that killed its worker come back as batches of one job."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.waiting = collections.deque(batches)
        self.tries: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.deaths = 0

    def take(self, model: str | None) -> Batch | None:
        """One of the model that the worker has loaded, else the first."""
        if not self.waiting:
            return None
        for i, batch in enumerate(self.waiting):
            if batch.model == model:
                del self.waiting[i]
                return batch
        return self.waiting.popleft()

    def lost(self, batch: Batch, reason: str) -> Painted | None:
        """The batch of a worker that died; what became of it, if it is given up.

        Raises RuntimeError when workers do nothing but die, whatever they are given. While all that waits has killed
        one already it is no news, and ends by `TRIES`.
        """
        self.deaths += 1
        if self.deaths >= _DEATHS and any(not self.tries[_key(waiting)] for waiting in self.waiting):
            raise RuntimeError(f"{self.deaths} workers died one after the other ({reason}): nothing can be painted")
        if len(batch.jobs) > 1:
            wanted = [job for job in batch.jobs if job.id in batch.wanted]
            self.waiting.extendleft(dataclasses.replace(batch, jobs=(job,)) for job in reversed(wanted))
            return None
        key = _key(batch)
        self.tries[key] += 1
        if self.tries[key] < TRIES:
            self.waiting.append(batch)
            return None
        return Painted(batch.number, (f"its worker died {TRIES} times ({reason})",), 0.0, jobs=batch.jobs)


def _key(batch: Batch) -> tuple[str, ...]:
    return tuple(job.id for job in batch.jobs)


def local(
    batches: Sequence[Batch], *, device: str, workers: int, threads: int | None = None
) -> Iterator[Painted | Step]:
    """Paints in `workers` processes; 0: in this one.

    device   of all workers; "cuda" gives worker i the GPU of number i modulo their count
    threads  of torch in each worker (default: the cores, divided among the workers)

    Raises RuntimeError when workers die one after the other.
    """
    if workers == 0:
        yield from _here(batches, device)
        return
    devices = [device] * workers
    if device == "cuda":
        devices = [f"cuda:{i % torch.cuda.device_count()}" for i in range(workers)]
    threads = threads or max(1, _cores() // workers)
    queue = _Queue(batches)
    pool = [_Process(str(i + 1), devices[i], threads) for i in range(min(workers, len(batches)))]
    try:
        for process in pool:
            process.give(queue.take(None))
        while busy := [process for process in pool if process.batch is not None]:
            ready = wait([process.connection for process in busy])
            for process in busy:
                if process.connection not in ready:
                    continue
                try:
                    message = process.connection.recv()
                except (EOFError, OSError):
                    reason, batch = process.end(), process.batch
                    assert batch is not None
                    yield Step(process.name, 0, 0, reason=reason)
                    given_up = queue.lost(batch, reason)
                    if given_up is not None:
                        yield given_up
                    following = queue.take(None)
                    process.batch = None
                    if following is not None:
                        process.start()
                        process.give(following)
                    continue
                if isinstance(message, Painted):
                    batch = process.batch
                    assert batch is not None
                    queue.deaths = 0
                    process.give(queue.take(batch.model))
                    yield dataclasses.replace(message, worker=process.name, jobs=batch.jobs)
                else:
                    yield Step(process.name, *message)
            for process in pool:  # a batch that came back in parts
                if process.batch is None and queue.waiting:
                    if not process.process.is_alive():
                        process.start()
                    process.give(queue.take(None))
        for process in pool:
            process.connection.close()  # which ends them
        for process in pool:
            process.process.join(5)
    finally:
        for process in pool:
            process.kill()


def _here(batches: Sequence[Batch], device: str) -> Iterator[Painted]:
    painter = Painter(device)
    for batch in batches:
        yield dataclasses.replace(painter.paint(batch), worker="0", jobs=batch.jobs)


class _Process:
    """A worker process, the batch it has, and the way to talk to it."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        self.name, self.device, self.threads = name, device, threads
        self.batch: Batch | None = None
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with CUDA or OpenMP threads hangs
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, self.device, self.threads), name=f"painter {self.name}", daemon=True
        )
        self.process.start()
        theirs.close()

    def give(self, batch: Batch | None) -> None:
        self.batch = batch
        if batch is not None:
            with contextlib.suppress(OSError):  # it died: reading from it says so
                self.connection.send(batch)

    def end(self) -> str:
        """Of what it died."""
        self.process.join(10)
        code = self.process.exitcode
        self.kill()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"worker {self.name}: {name}" + (", out of memory?" if name == "SIGKILL" else "")
        return f"worker {self.name}: exit code {code}"

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _work(connection: Connection, device: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    last = 0.0

    def after_step(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _STEP_SECONDS:
            last = now
            connection.send((done, total, size))

    painter = Painter(device, after_step)
    try:
        while True:
            batch = connection.recv()
            size = len(batch.jobs)
            connection.send(painter.paint(batch))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has gone


def _die_with_parent() -> None:
    """A parent that was killed has no time to end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ray_cluster(
    batches: Sequence[Batch],
    *,
    device: str,
    workers: int,
    threads: int | None = None,
    address: str | None = None,
) -> Iterator[Painted | Step]:
    """Paints in `workers` actors of a Ray cluster, each with a GPU or `threads` cores.

    address  of the cluster (default: one is started on this machine)

    Raises ValueError when Ray is not installed; OSError when no cluster answers at the address; RuntimeError when
    workers die one after the other.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("ray not installed: pip install 'anima-fast[ray]'")
    if address is not None:
        _check_answers(address)
    ray = importlib.import_module("ray")
    gone = importlib.import_module("ray.exceptions").RayError
    threads = threads or max(1, _cores() // workers)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", configure_logging=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if address is None:
            raise ConnectionError(f"--engine ray: no cluster can be started here ({reason})") from error
        raise ConnectionError(f"--address: no Ray cluster at {address!r} ({reason})") from error
    gpu = torch.device(device).type == "cuda"
    actor = ray.remote(num_cpus=0 if gpu else threads, num_gpus=1 if gpu else 0, max_restarts=0)(_Actor)
    queue = _Queue(batches)
    running: dict[Any, tuple[int, Any, Batch]] = {}

    def give(i: int, worker: Any, model: str | None) -> None:
        batch = queue.take(model)
        if batch is not None:
            worker = worker or actor.remote(device, threads)
            running[worker.paint.remote(batch)] = i, worker, batch

    try:
        for i in range(min(workers, len(batches))):
            give(i, None, None)
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            i, worker, batch = running.pop(ready[0])
            try:
                painted, node = ray.get(ready[0])
            except gone as error:
                reason = f"worker {i + 1}: {type(error).__name__}"
                yield Step(str(i + 1), 0, 0, reason=reason)
                given_up = queue.lost(batch, reason)
                if given_up is not None:
                    yield given_up
                give(i, None, None)
            else:
                queue.deaths = 0
                give(i, worker, batch.model)
                yield dataclasses.replace(painted, worker=f"{i + 1} ({node})", jobs=batch.jobs)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    match = re.fullmatch(r"(?:ray://)?(.+):(\d{1,5})", address)
    if match is None:
        return  # "auto", "local": names that Ray knows
    try:
        with socket.create_connection((match[1], int(match[2])), timeout=10) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(_HTTP2)
            if connection.recv(9)[3:4] != b"\4":
                raise OSError("what answers there is no Ray; its dashboard is at another port")
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"--address: no Ray cluster answers at {address!r} ({error})") from error


class _Actor:
    """A `Painter` in a process of Ray's."""

    def __init__(self, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.painter = Painter(device)

    def paint(self, batch: Batch) -> tuple[Painted, str]:
        return self.painter.paint(batch), f"process {os.getpid()} on {platform.node()}"
