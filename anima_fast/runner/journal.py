"""What a batch run has done so far: `journal.jsonl` in its directory, one JSON object a line, only ever added to.

    {"event": "done", "id": "street", "digest": "0f…", "file": "street.png", "bytes": 81234, "seconds": 1.2, …}
    {"event": "failed", "id": "tree", "line": 7, "reason": "…"}

A line goes to the disk after its picture has. A process that is killed can leave a picture without its line, or half a
line: the picture holds its own record and is recognised by it, and half a line counts as none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import invalid
from .jobs import BadJob, Job, digest
from .request import read_record

__all__ = ["NAME", "Journal", "finished", "read"]

NAME = "journal.jsonl"


def read(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of the directory's journal; none if there is none."""
    path = directory / NAME
    if not path.exists():
        return []
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # written when its process was killed
        if isinstance(event, dict):
            events.append(event)
    return events


def finished(directory: Path, jobs: list[Job]) -> tuple[dict[str, bool], list[BadJob]]:
    """The jobs whose picture is there, by id, and whether the journal knows; and those whose name another one has.

    A journal's word counts when the file has the size that it names. A picture it does not know is decoded whole.
    """
    known = {event["id"]: event for event in read(directory) if event.get("event") == "done" and "id" in event}
    done: dict[str, bool] = {}
    taken: list[BadJob] = []
    for job in jobs:
        path = directory / job.file
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            continue
        event = known.get(job.id)
        if event is not None and event.get("digest") == job.digest and event.get("bytes") == size:
            done[job.id] = True
        elif _is_of(path, job):
            done[job.id] = False
        else:
            reason = f"id: {job.file} is there and is the picture of another request; allowed: another id, or remove it"
            taken.append(BadJob(job.line, reason, job.id))
    return done, taken


def _is_of(path: Path, job: Job) -> bool:
    from PIL import Image

    try:
        if digest(read_record(str(path))) != job.digest:
            return False
        with Image.open(path) as image:
            image.load()
    except (ValueError, TypeError, OSError, SyntaxError):
        return False
    return True


class Journal:
    """Adds lines, each on the disk when `add` returns. One process at a time has a directory's journal.

    Raises ValueError when another run has it; OSError when the directory cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / NAME
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by __exit__)
        if not _lock(self._file.fileno()):
            self._file.close()
            raise invalid("--out", f"{str(directory)!r}, into which another run is painting", "another directory")
        end = self._file.seek(0, os.SEEK_END)
        if end:
            self._file.seek(end - 1)
            if self._file.read(1) != b"\n":
                self._write(b"\n")  # half a line of a process that was killed

    def add(self, event: str, **fields: Any) -> None:
        line = {"event": event, **fields, "time": round(time.time(), 3)}
        self._write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> bool:
        os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte nobody writes: a locked one cannot be read by others
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
