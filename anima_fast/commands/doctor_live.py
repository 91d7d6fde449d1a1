"""The part of `anima-fast doctor` that runs something, on the server or on a diffusers model: --submit and --ablate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..doctor import live
from ..doctor.ablations import Official
from ..doctor.case import Case
from ..doctor.findings import Finding
from ..doctor.server import Progress, Refused, Server

__all__ = ["run_live"]


def run_live(
    options: argparse.Namespace, case: Case, findings: Sequence[Finding], server: Server | None
) -> tuple[dict[str, Any], int]:
    """What it adds to the JSON document, and the exit code. Without a server, --model is given."""
    found: dict[str, Any] = {}
    code = 0
    if options.submit and server is not None:
        found["submitted"], code = _submit(options, case.workflow.to_api(case.object_info), server)
    if options.ablate:
        found["tests"], tests_code = _ablate(options, case, findings, server)
        code = max(code, tests_code)
    return found, code


def _clear() -> None:
    """Take the progress line away before results are printed."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _submit(options: argparse.Namespace, prompt: Any, server: Server) -> tuple[dict[str, Any], int]:
    tell = _bar("workflow")
    try:
        done = live.submit(prompt, server, tell=lambda step: tell(step), fetch=False)
    except Refused as error:
        _clear()
        if not options.json:
            print(f"\nthe server refused it: {error}")
            for node, reasons in error.nodes.items():
                print(f"  node {node}: {'; '.join(reasons)}")
        return {"status": "refused", "error": str(error), "nodes": error.nodes}, 1
    _clear()
    result = done.result
    files = [f"{file.subfolder + '/' if file.subfolder else ''}{file.filename}" for file in result.files()]
    if not options.json:
        print(f"\nsubmitted: {result.status} after {result.seconds:.1f} s{f': {result.error}' if result.error else ''}")
        for file in files:
            print(f"  {file}")
    ended = {"status": result.status, "seconds": result.seconds, "error": result.error, "files": files}
    return ended, int(result.status != "success")


def _ablate(
    options: argparse.Namespace, case: Case, findings: Sequence[Finding], server: Server | None
) -> tuple[dict[str, Any], int]:
    bars: dict[str, Callable[[Progress], None]] = {}

    def tell(test: str, number: int, count: int, step: Progress) -> None:
        if test not in bars:
            bars[test] = _bar(f"test {number} of {count}: {test}")
        bars[test](step)

    given = {"size": options.baseline_size, "steps": options.baseline_steps, "text": options.baseline_prompt}
    official = Official(**{name: value for name, value in given.items() if value})
    if options.model is not None:
        run = _on_pipeline(options, case, official, tell)
    else:
        assert server is not None  # the options were refused otherwise
        prompt, environment = case.workflow.to_api(case.object_info), dict(case.environment or {})
        run = live.run(
            prompt, server, official=official, everything=options.all_tests, environment=environment, tell=tell
        )
    _clear()
    if options.report:
        from ..doctor.report import write

        write(options.report, run, findings=[f.as_json() for f in findings], workflow=case.workflow.path)
    if not options.json:
        _print(run)
        if options.report:
            print(f"report: {options.report}")
    if run.interrupted:
        return run.to_json(), 130
    return run.to_json(), int(run.verdict.fault != "none")


def _on_pipeline(options: argparse.Namespace, case: Case, official: Official, tell: live.Tell) -> live.Run:
    import torch

    from ..doctor import pipeline
    from ..runner.model import find, load, quiet

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "fp32" if device == "cpu" else "bf16"
    request, notes = pipeline.request_of(case, options.model, dtype)
    request.check()
    for note in notes:
        print(f"anima-fast doctor: warning: {note}", file=sys.stderr)
    pipe = load(find(options.model), dtype=pipeline.DTYPES[dtype], device=device)
    with quiet():
        return pipeline.run(pipe, request, official=official, everything=options.all_tests, tell=tell)


def _print(run: live.Run) -> None:
    print()
    for row in run.rows:
        why = f": {row.why}" if row.why else ""
        print(f"  {row.test:<14} {row.kind or row.status}{why}")
    print(f"\nverdict: {run.verdict.summary}")
    for line in run.verdict.evidence:
        print(f"  {line}")
    for line in run.verdict.advice:
        print(f"  do: {line}")
    if run.verdict.missing:
        print(f"  missing: {', '.join(run.verdict.missing)}")
    if run.stopped:
        print(f"  stopped: {run.stopped}")


def _bar(title: str) -> Callable[[Progress], None]:
    """Progress on stderr: one line rewritten on a terminal, one line a prompt elsewhere."""
    rewrite = sys.stderr.isatty()
    if not rewrite:
        print(title, file=sys.stderr, flush=True)

    def tell(step: Progress) -> None:
        if not rewrite:
            return
        if step.ahead:
            text = f"{title}: {step.ahead} before it in the queue"
        elif step.total:
            text = f"{title}: node {step.node}, {step.done} of {step.total}"
        else:
            text = f"{title}: node {step.node or '…'}"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    return tell
