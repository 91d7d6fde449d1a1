"""`anima-fast doctor`: what is wrong with a ComfyUI workflow, read from its file and, if asked, from a server.

Exit code 0: nothing, or notes only. 1: errors or warnings (with --fix: that are left in the corrected workflow), or a
run that found a fault. 2: the workflow cannot be read, or the server cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..doctor.case import Case
from ..doctor.checks import run as check
from ..doctor.checks.environment import table
from ..doctor.findings import SEVERITIES, Finding
from ..doctor.passes import Pass, sampling
from ..doctor.workflow import Link, Workflow, read, read_text
from ..errors import invalid

__all__ = ["run"]

_COLOURS = {"error": "31;1", "warning": "33;1", "note": "34;1", "dim": "2", "bold": "1", "good": "32;1"}


def run(options: argparse.Namespace) -> int:
    _refuse(options)
    workflow = read(options.workflow)  # before a server is asked: a file that is none needs no server
    if options.comfyui is None:
        return _report(options, workflow, None)
    from ..doctor.server import Server

    with Server(options.comfyui, timeout=options.timeout) as server:
        environment = server.environment()
        workflow = read(options.workflow, environment.get("object_info"))
        return _report(options, workflow, environment, server)


def _refuse(options: argparse.Namespace) -> None:
    if options.submit and options.comfyui is None:
        raise invalid("--submit", "no server", "together with --comfyui URL")
    if options.ablate and options.comfyui is None and options.model is None:
        raise invalid("--ablate", "no server and no model", "together with --comfyui URL, or --model DIR")
    if options.model is not None and not options.ablate:
        raise invalid("--model", options.model, "together with --ablate: its tests run on that model")
    if options.report is not None and not options.ablate:
        raise invalid("--report", options.report, "together with --ablate: it is the report of its tests")
    if options.models is not None and not Path(options.models).is_dir():
        raise invalid("--models", options.models, "ComfyUI's models folder")
    if options.fix is not None and Path(options.fix).resolve() == Path(options.workflow).resolve():
        raise invalid("--fix", options.fix, "another file than the workflow: what was wrong stays to compare with")


def _report(
    options: argparse.Namespace, workflow: Workflow, environment: Mapping[str, Any] | None, server: Any = None
) -> int:
    case = _case(options, workflow, environment)
    findings = check(case)
    fixed = _fix(options, environment) if options.fix else None
    if options.picture:
        from ..doctor.picture import draw

        draw(case, findings, options.picture)
    summary = _summary(case, findings)
    if fixed is not None:
        summary["fixed"] = {
            "file": options.fix,
            "edits": [{"id": f.id, "node": e.node, "input": e.input, "value": _plain(e.value)} for f, e in fixed.done],
            "left": [finding.as_json() for finding in fixed.left],
        }
    left = findings if fixed is None else list(fixed.left)
    code = int(any(finding.severity != "note" for finding in left))
    if not options.json:
        _print(case, findings, environment)
        if fixed is not None:
            _print_fixed(options.fix, fixed)
        if options.picture:
            print(f"picture: {options.picture}")
    if options.submit or options.ablate:
        from .doctor_live import run_live

        live, live_code = run_live(options, case, findings, server)
        summary.update(live)
        code = max(code, live_code)
    if options.json:
        print(json.dumps(summary, indent=2))
    return code


def _case(options: argparse.Namespace, workflow: Workflow, environment: Mapping[str, Any] | None) -> Case:
    picture = workflow.image
    if options.png:
        picture = _picture_size(options.png)
    models = Path(options.models) if options.models else None
    return Case(workflow, environment, models, Path(options.workflow).parent, picture)


def _picture_size(path: str) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise invalid("--png", path, "a picture") from error


def _fix(options: argparse.Namespace, environment: Mapping[str, Any] | None) -> Any:
    """Write the corrected workflow: in the file's own text, or for a PNG the prompt in it."""
    from ..doctor.fix import fix

    info = (environment or {}).get("object_info")
    name = Path(options.workflow).name
    before = read(options.workflow, info)
    if before.image is None:
        text = Path(options.workflow).read_bytes().decode("utf-8-sig")
    else:
        text = json.dumps(before.document, indent=2, ensure_ascii=False)
    fixed = fix(
        text,
        lambda changed: read_text(name, changed, info),
        lambda workflow: check(_case(options, workflow, environment)),
    )
    Path(options.fix).write_text(fixed.text, encoding="utf-8", newline="")
    return fixed


def _summary(case: Case, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "workflow": case.workflow.path,
        "form": case.workflow.kind,
        "nodes": {"all": len(case.workflow.nodes), "run": len(case.live), "skipped": len(case.workflow.skipped)},
        "counts": {level: sum(finding.severity == level for finding in findings) for level in SEVERITIES},
        "findings": [finding.as_json() for finding in findings],
        "passes": [_pass(case, one) for one in case.passes],
        "environment": table(case),
    }


def _pass(case: Case, one: Pass) -> dict[str, Any]:
    found = sampling(case.workflow, one.path)
    names = ("steps", "cfg", "sampler_name", "scheduler", "denoise", "seed", "noise_seed")
    return {
        "sampler": str(one.node),
        "model_path": [str(node) for node in reversed(one.path)],
        "later": one.later,
        "tiled": one.tiled,
        "turbo": one.turbo,
        "size": [one.size.width, one.size.height] if one.size.known else None,
        "shift": _plain(found.shift),
        **{name: _plain(one.get(name)) for name in names if name in one.settings},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Link):
        return [value.node, value.slot]
    return value if isinstance(value, (str, int, float, bool, type(None), list, dict)) else str(value)


def _paint(text: str, colour: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m"


def _print(case: Case, findings: Sequence[Finding], environment: Mapping[str, Any] | None) -> None:
    workflow = case.workflow
    form = "API form" if workflow.kind == "api" else "user interface's form"
    skipped = f", {len(workflow.skipped)} muted or bypassed" if workflow.skipped else ""
    nodes = f"{len(workflow.nodes)} nodes, {len(case.live)} in a run{skipped}"
    print(f"{_paint(workflow.path, 'bold')}: {form}, {nodes}")
    for number, one in enumerate(case.passes, 1):
        _print_pass(case, one, number)
    rows = table(case)
    if rows:
        print()
        width = max(map(len, rows))
        for name, value in rows.items():
            print(_wrapped(value, f"  {name:<{width}}  ", " " * (width + 4)))
    for finding in findings:
        _print_finding(finding)
    counts = [(level, sum(finding.severity == level for finding in findings)) for level in SEVERITIES]
    said = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts if count]
    print()
    print(_paint(", ".join(said), "bold") if said else _paint("nothing found", "good"))


def _print_pass(case: Case, one: Pass, number: int) -> None:
    size = f"{one.size.width:g} x {one.size.height:g}" if one.size.known else "size computed"
    said = [size]
    for name, text in (("steps", "{} steps"), ("cfg", "CFG {}"), ("sampler_name", "{}"), ("scheduler", "{}")):
        if one.get(name) is not None:
            said.append(text.format(one.get(name)))
    if one.denoise != 1:
        said.append(f"denoise {one.denoise:g}")
    found = sampling(case.workflow, one.path)
    if case.anima:
        said.append(f"shift {found.shift:g}" if isinstance(found.shift, (int, float)) else f"shift {found.shift}")
    for flag, name in ((one.later, "later pass"), (one.tiled, "tiled"), (bool(one.turbo), f"turbo: {one.turbo}")):
        if flag:
            said.append(name)
    print(_wrapped(", ".join(said), f"  pass {number}  ", " " * 10))
    path = " → ".join(str(node) for node in [*reversed(one.path), one.node])
    print(_paint(_wrapped(path, " " * 10, " " * 10), "dim"))


def _wrapped(text: str, first: str, rest: str) -> str:
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 110)
    return "\n".join(
        textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
        )
    )


def _print_finding(finding: Finding) -> None:
    print()
    first = f"{finding.severity:<7}  "
    text = _wrapped(f"[{finding.id}] {finding.summary}", first, " " * 9)
    print(_paint(text[:7], finding.severity) + _paint(text[7:], "bold"))
    for name, value in finding.evidence.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(_wrapped(f"{name} = {_plain(shown)}" if value != "" else name, " " * 9, " " * 13))
    print(_wrapped(finding.why, " " * 9 + "why  ", " " * 14))
    mend = f"{finding.fix}{' (--fix does this)' if finding.edits and finding.severity != 'note' else ''}"
    print(_wrapped(mend, " " * 9 + "fix  ", " " * 14))
    print(_paint(f"{' ' * 9}see  {finding.docs}", "dim"))


def _print_fixed(path: str, fixed: Any) -> None:
    for finding, edit in fixed.done:
        if edit.input:
            value = f"{edit.value.node} output {edit.value.slot}" if isinstance(edit.value, Link) else repr(edit.value)
            what = f"node {edit.node}: {edit.input} = {value}"
        else:
            what = f"node {edit.node}: bypassed" if edit.value is None else f"node {edit.node}: becomes {edit.value}"
        print(f"  fixed {finding.id}: {what}")
    left = [finding for finding in fixed.left if finding.severity != "note"]
    rest = f"; left to you: {', '.join(sorted({finding.id for finding in left}))}" if left else "; it passes"
    print(f"corrected workflow: {path}{rest}")
