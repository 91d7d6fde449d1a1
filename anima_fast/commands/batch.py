"""`anima-fast batch`: thousands of pictures from a file of jobs, safe to kill at any moment and to run again."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import errno
import importlib.util
import json
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .. import __version__
from ..errors import invalid
from ..files import write_atomic
from ..runner import journal, workers
from ..runner.batch import Painted
from ..runner.jobs import BadJob, Batch, Job, group, one_line, read_jobs
from ..runner.model import HUB_NAME, find
from .bench import check_device, default_device

__all__ = ["run"]

_SHOWN = 10  # bad jobs on stderr; the journal has all
_PLAIN_SECONDS = 10.0  # between lines of progress where there is no terminal

#: What stops a run, and what to do about it.
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too big",
}
_NO_WRITING = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "the disk reports an error",
}


@dataclasses.dataclass
class _Counts:
    jobs: int = 0
    before: int = 0  # painted by an earlier run
    painted: int = 0
    failed: int = 0

    @property
    def left(self) -> int:
        return self.jobs - self.before - self.painted - self.failed


def run(options: argparse.Namespace) -> int:
    """Exit code 1 if a job could not be painted."""
    if options.address is not None and options.engine != "ray":
        raise invalid("--address", "one without --engine ray", "both or neither")
    if options.workers < 0:
        raise invalid("--workers", str(options.workers), "a whole number >= 0")
    device = check_device(options.device or default_device())
    directory = Path(options.out)
    for path in (directory, *directory.parents):
        if path.is_file():
            where = "which" if path == directory else f"but {str(path)!r}"
            raise invalid("--out", f"{options.out!r}, {where} is a file", "a directory")
    defaults = {name: getattr(options, name) for name in ("model", "dtype") if getattr(options, name) is not None}
    defaults.setdefault("dtype", "fp32" if torch.device(device).type == "cpu" else "bf16")
    jobs, bad = read_jobs(options.jobs, defaults)
    if not jobs and not bad:
        raise invalid("JOBS", f"{options.jobs!r}, which is empty", "one JSON object a line")
    jobs, no_model = _with_models(jobs, download=not options.dry_run)
    bad += no_model
    done, taken = journal.finished(directory, jobs)
    names = {job.id for job in taken}
    bad += taken
    batches = [
        dataclasses.replace(batch, wanted=wanted)
        for batch in group(jobs, options.batch_size)
        if (wanted := frozenset(job.id for job in batch.jobs) - done.keys() - names)
    ]
    bad.sort(key=lambda job: job.line)
    counts = _Counts(len(jobs) + len(bad) - len(taken), len(done), failed=len(bad))
    if options.dry_run:
        return _dry_run(options, batches, bad, counts)
    return _paint(options, directory, device, jobs, done, batches, bad, counts)


def _paint(
    options: argparse.Namespace,
    directory: Path,
    device: str,
    jobs: Sequence[Job],
    done: dict[str, bool],
    batches: Sequence[Batch],
    bad: list[BadJob],
    counts: _Counts,
) -> int:
    started = time.perf_counter()
    wanted = {batch.number: batch.wanted for batch in batches}
    with (
        _stop_at(directory, counts),
        _open(directory) as log,
        _Progress(counts, options.json) as progress,
        contextlib.closing(_engine(options, batches, device)) as engine,  # whatever stops the run ends its workers
    ):
        _remove_remains(directory, {job.file for job in jobs})
        log.add("start", version=__version__, jobs=counts.jobs, engine=options.engine, workers=options.workers)
        for job in jobs:
            if done.get(job.id) is False:  # its process was killed between the picture and the journal
                _log_done(log, job, directory, recovered=True)
        for wrong in bad:
            log.add("failed", id=wrong.id, line=wrong.line, reason=wrong.reason)
        for event in engine:
            if isinstance(event, workers.Step):
                progress.step(event)
                continue
            for job, picture in zip(event.jobs, event.pictures, strict=True):
                if job.id not in wanted[event.number]:
                    continue
                if isinstance(picture, str):
                    bad.append(BadJob(job.line, picture, job.id))
                    log.add("failed", id=job.id, line=job.line, reason=picture)
                    counts.failed += 1
                else:
                    write_atomic(directory / job.file, picture)
                    share = round(event.seconds / len(event.jobs), 3)
                    _log_done(log, job, directory, seconds=share, rows=len(event.jobs), worker=event.worker)
                    counts.painted += 1
            progress.batch(event)
    seconds = time.perf_counter() - started
    bad.sort(key=lambda job: job.line)
    if options.json:
        report = {
            "out": str(directory),
            **dataclasses.asdict(counts),
            "seconds": round(seconds, 3),
            "jobs_per_second": round(counts.painted / seconds, 3),
            "bad": [dataclasses.asdict(job) for job in bad],
        }
        print(json.dumps(report, indent=1))
    else:
        before = f", {counts.before} were there already" if counts.before else ""
        rate = f" ({counts.painted / seconds:.2f} a second)" if counts.painted else ""
        print(
            f"{directory}: {counts.painted} pictures painted in {seconds:.1f} s{rate}{before}, {counts.failed} failed"
        )
        _show(bad, f"; all of them: {directory / journal.NAME}")
    return 1 if bad else 0


def _dry_run(options: argparse.Namespace, batches: Sequence[Batch], bad: list[BadJob], counts: _Counts) -> int:
    kinds: collections.Counter[tuple[str, str, int, str]] = collections.Counter()
    launches: collections.Counter[tuple[str, str, int, str]] = collections.Counter()
    for batch in batches:
        request = batch.jobs[0].request
        kind = (request.model, "{}x{}".format(*request.size), request.steps, request.dtype)
        kinds[kind] += len(batch.wanted)
        launches[kind] += 1
    if options.json:
        groups = [
            {"model": k[0], "size": k[1], "steps": k[2], "dtype": k[3], "jobs": n, "batches": launches[k]}
            for k, n in kinds.items()
        ]
        report = {**dataclasses.asdict(counts), "left": counts.left, "groups": groups}
        print(json.dumps({**report, "bad": [dataclasses.asdict(job) for job in bad]}, indent=1))
    else:
        print(f"{counts.jobs} pictures: {counts.before} there already, {counts.left} to paint, {counts.failed} bad")
        for kind, number in kinds.items():
            print(f"  {number} of {kind[1]}, {kind[2]} steps, {kind[3]}, in {launches[kind]} batches ({kind[0]})")
        _show(bad, "")
    return 1 if bad else 0


def _with_models(jobs: Sequence[Job], *, download: bool) -> tuple[list[Job], list[BadJob]]:
    """The jobs whose model is there, downloaded now if it has to be: not by several workers at once."""
    problems: dict[str, str] = {}
    for model in dict.fromkeys(job.request.model for job in jobs):
        if not download and HUB_NAME.fullmatch(model) and not Path(model).exists():
            continue
        try:
            find(model)
        except (ValueError, OSError) as error:
            problems[model] = one_line(error)
    good = [job for job in jobs if job.request.model not in problems]
    return good, [BadJob(j.line, problems[j.request.model], j.id) for j in jobs if j.request.model in problems]


def _engine(
    options: argparse.Namespace, batches: Sequence[Batch], device: str
) -> Generator[Painted | workers.Step, None, None]:
    if not batches:
        return
    if options.engine == "ray":
        yield from workers.ray_cluster(
            batches, device=device, workers=max(1, options.workers), threads=options.threads, address=options.address
        )
    else:
        yield from workers.local(batches, device=device, workers=options.workers, threads=options.threads)


def _open(directory: Path) -> journal.Journal:
    directory.mkdir(parents=True, exist_ok=True)
    return journal.Journal(directory)


def _log_done(log: journal.Journal, job: Job, directory: Path, **fields: Any) -> None:
    size = (directory / job.file).stat().st_size
    log.add("done", id=job.id, digest=job.digest, file=job.file, bytes=size, line=job.line, **fields)


def _remove_remains(directory: Path, files: set[str]) -> None:
    """Temporary files of `write_atomic` in a process that was killed: .NAME.png.RANDOM"""
    for path in directory.glob(".*.png.*"):
        if path.name[1:].rpartition(".")[0] in files:
            path.unlink()


@contextlib.contextmanager
def _stop_at(directory: Path, counts: _Counts) -> Iterator[None]:
    """What ends a run before its end says what is safe and what to do."""
    again = "the pictures so far are whole; the same command paints the rest"
    try:
        yield
    except FileNotFoundError as error:
        raise OSError(f"--out {directory}: it is no longer there; the same command begins anew") from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(
                f"--out {directory}: {_NO_ROOM[error.errno]}, with {counts.left} pictures to paint; {again}"
            ) from error
        if error.errno in _NO_WRITING:
            raise OSError(f"--out {directory}: cannot be written to ({_NO_WRITING[error.errno]}); {again}") from error
        raise
    except RuntimeError as error:
        raise OSError(f"{error}; {again}") from error
    except KeyboardInterrupt:
        print(f"anima-fast batch: {counts.left} pictures to paint; {again}", file=sys.stderr)
        raise


def _show(bad: Sequence[BadJob], where: str) -> None:
    for job in bad[:_SHOWN]:
        name = f" ({job.id})" if job.id else ""
        print(f"anima-fast batch: line {job.line}{name}: {job.reason}", file=sys.stderr)
    if len(bad) > _SHOWN:
        print(f"anima-fast batch: and {len(bad) - _SHOWN} more{where}", file=sys.stderr)


class _Progress:
    """On a terminal a bar of all jobs and one of each worker's batch (rich); elsewhere a line now and then."""

    def __init__(self, counts: _Counts, silent: bool) -> None:
        self.counts = counts
        self.rich: Any = None
        self.tasks: dict[str, Any] = {}
        self.silent = silent
        self.started = self.last = time.monotonic()
        if sys.stderr.isatty() and not silent and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.all = self.rich.add_task("pictures", total=counts.jobs, completed=self._finished(), note="")

    def _finished(self) -> int:
        return self.counts.jobs - self.counts.left

    def step(self, event: workers.Step) -> None:
        if event.reason:
            self._print(f"{event.reason} died; its batch is given out again")
        elif self.rich is not None:
            if event.worker not in self.tasks:
                self.tasks[event.worker] = self.rich.add_task(f"worker {event.worker}", total=1, note="")
            note = f"steps of {event.jobs} pictures"
            self.rich.update(self.tasks[event.worker], total=event.total, completed=event.done, note=note)

    def batch(self, event: Painted) -> None:
        if self.rich is not None:
            note = f"{self.counts.failed} failed" if self.counts.failed else ""
            self.rich.update(self.all, completed=self._finished(), note=note)
        elif time.monotonic() - self.last >= _PLAIN_SECONDS:
            self.last = time.monotonic()
            rate = self.counts.painted / (self.last - self.started)
            rest = f"{self.counts.left / rate:.0f} s to go" if rate else "none painted yet"
            self._print(f"{self._finished()} of {self.counts.jobs}, {self.counts.failed} failed, {rest}")

    def _print(self, text: str) -> None:
        if self.rich is not None:
            self.rich.console.print(text, markup=False, highlight=False)
        elif not self.silent:
            print(f"anima-fast batch: {text}", file=sys.stderr)

    def __enter__(self) -> _Progress:
        if self.rich is not None:
            self.rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rich is not None:
            self.rich.stop()
