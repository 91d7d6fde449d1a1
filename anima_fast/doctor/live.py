"""The decision tree on a live server: each test queued, followed, measured, and the verdict over all of them.

    with Server(address) as server:
        run = live.run(workflow.to_api(info), server)
        print(run.verdict.summary)
    report.write(run, "report.html")

Interrupted (Ctrl-C) or left by its server, a run keeps what was measured until then; leaving the `with` takes back what
was queued.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from . import measure
from .ablations import END, Ablation, Official, plan
from .environment import facts
from .server import File, Progress, Prompt, Refused, Result, Server, ServerError
from .verdict import TESTS, Row, Verdict, verdict

__all__ = ["Run", "Submission", "Tell", "collect", "run", "submit"]

#: Called with (test, its number, number of tests, progress of its prompt).
Tell = Callable[[str, int, int, Progress], None]


@dataclasses.dataclass
class Run:
    """What a run of the tests gave. `pictures` are PNG files by test; `stopped` says why not all were run."""

    rows: list[Row]
    verdict: Verdict
    pictures: dict[str, bytes]
    environment: dict[str, Any]
    official: Official
    stopped: str | None = None
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Without the pictures, and without the raw answers of the server."""
        return {
            "verdict": self.verdict.to_json(),
            "tests": [row.to_json() for row in self.rows],
            "environment": {name: self.environment.get(name) for name in ("address", "facts", "unknown")},
            "baseline": dataclasses.asdict(self.official),
            "stopped": self.stopped,
        }


@dataclasses.dataclass
class Submission:
    """A submitted workflow's end, and its files with their bytes."""

    result: Result
    files: list[tuple[File, bytes]]


def run(
    prompt: Prompt,
    server: Server,
    *,
    official: Official | None = None,
    everything: bool = False,
    environment: dict[str, Any] | None = None,
    tell: Tell | None = None,
) -> Run:
    """Run the tests of a workflow on a server.

    Args:
        prompt: the workflow in API form.
        everything: also the tests that the tree does not need for its verdict.
        environment: of `server.environment()`, if it is at hand.
        official: the baseline's numbers, to make it smaller on a slow machine.
        tell: is told the progress.

    Raises ValueError if there is nothing to test in the workflow, ServerError if the server is not there.
    """
    environment = environment or server.environment()
    official = official or Official()
    ablations = {a.test: a for a in plan(prompt, environment["object_info"], official)}

    def execute(test: str, number: int, count: int) -> tuple[Row, bytes | None]:
        return _execute(ablations[test], server, lambda step: tell(test, number, count, step) if tell else None)

    found = collect(execute, ablations, environment, official, everything)
    if found.stopped is None:
        # Only now the models are loaded, and the log says in which types.
        found.environment |= facts({**environment, "log": [*environment.get("log", ()), *server.log()[0]]})
    return found


def collect(
    execute: Callable[[str, int, int], tuple[Row, bytes | None]],
    ablations: Mapping[str, Ablation],
    environment: dict[str, Any],
    official: Official,
    everything: bool,
) -> Run:
    """Execute tests, in order or as the verdict asks for them, until it is decided or nothing more can be run."""
    found = Run([], verdict([]), {}, environment, official)
    arrays: dict[str, Any] = {}
    try:
        while True:
            done = {row.test for row in found.rows}
            if everything:
                wanted = [test for test in TESTS if test in ablations and test not in done]
            else:
                # A skipped test points at the one whose result stands for it: that one is needed then.
                found.verdict = verdict(found.rows)
                needed = _needed(found.verdict.missing, ablations)
                if not done:
                    needed = _needed(("workflow",), ablations)
                wanted = [test for test in needed if test not in done]
            if not wanted:
                break
            test = wanted[0]
            row, picture = execute(test, len(done) + 1, len(TESTS) if everything else len(done) + len(wanted))
            if picture is not None:
                found.pictures[test] = picture
                arrays[test] = measure.decode(picture)
                reference = arrays.get("first_pass", arrays.get("workflow"))
                if test not in ("baseline", "files", "workflow", "first_pass") and reference is not None:
                    row = dataclasses.replace(row, difference=measure.difference(arrays[test], reference))
            found.rows.append(row)
    except ServerError as error:
        found.stopped = str(error)
    except KeyboardInterrupt:
        found.stopped, found.interrupted = "interrupted", True
    found.rows.sort(key=lambda row: list(TESTS).index(row.test))
    found.verdict = verdict(found.rows)
    return found


def submit(
    prompt: Prompt, server: Server, tell: Callable[[Progress], None] | None = None, *, fetch: bool = True
) -> Submission:
    """Queue a workflow as it is and follow it to its end.

    Raises Refused if the server does not take it, ServerError if it goes away. A workflow that fails is a result.
    """
    result = server.follow(server.queue(prompt), tell)
    return Submission(result, [(file, server.fetch(file)) for file in result.files()] if fetch else [])


def _needed(tests: tuple[str, ...], ablations: Mapping[str, Ablation]) -> list[str]:
    found: dict[str, None] = {}
    for test in tests:
        while test in ablations and test not in found:
            found[test] = None
            twin = ablations[test].same_as
            if ablations[test].prompt is not None or twin is None:
                break
            test = twin
    return list(found)


def _execute(ablation: Ablation, server: Server, tell: Callable[[Progress], None]) -> tuple[Row, bytes | None]:
    test, changes = ablation.test, ablation.changes
    if ablation.prompt is None:
        return Row(test, "skipped", why=ablation.why, same_as=ablation.same_as, changes=changes), None
    _, moment = server.log()
    try:
        result = server.follow(server.queue(ablation.prompt), tell)
    except Refused as error:
        return Row(test, "failed", why=str(error), changes=changes), None
    lines, _ = server.log(moment)
    log = tuple(line for line in lines if "anima" in line.lower() and not line.startswith("Requested to load"))[:200]
    if test == "shapes":
        # That file begins each run with a line of its own.
        told = server.regional_log()
        start = max((i for i, line in enumerate(told) if line.startswith("=== New run")), default=len(told))
        log += tuple(told[start:][:60])
    if result.status != "success":
        return Row(test, "failed", why=result.error, changes=changes, seconds=result.seconds, log=log), None
    files = result.files(END)
    if not files:
        return Row(test, "failed", why="it made no picture", changes=changes, seconds=result.seconds, log=log), None
    data = server.fetch(files[0])
    try:
        if files[0].kind == "latents":
            planes, cell = measure.latent_array(data), 1
            picture = measure.latent_picture(planes)
        else:
            planes, cell = measure.decode(data), measure.CELL
            picture = data
        numbers = measure.measure(planes, cell)
    except ValueError as error:
        return Row(test, "failed", why=str(error), changes=changes, seconds=result.seconds, log=log), None
    return Row(test, "measured", numbers, changes=changes, seconds=result.seconds, log=log), picture
