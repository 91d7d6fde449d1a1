"""A run's report: the verdict, the pictures side by side with their numbers, the findings, the server.

`.html` is one file with everything in it. `.md` has its pictures beside it, in a folder of its name, since Markdown on
the usual sites shows no embedded ones. Text of workflows and servers is escaped in both.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import invalid
from ..files import write_atomic
from .environment import said
from .live import Run
from .verdict import TESTS, Row

__all__ = ["write"]

#: Pictures in reports are at most this wide and high: noise and picture are told apart, and a report stays mailable.
_LARGEST = 512

_KINDS = {
    "picture": "a picture",
    "noise": "noise",
    "blank": "blank",
    "unclear": "unclear",
    "failed": "did not run",
    "skipped": "nothing to change",
}


def write(
    path: str | Path, run: Run, *, findings: Sequence[Mapping[str, Any]] = (), workflow: str = "the workflow"
) -> None:
    """Write the report of `run` to `path` (.html or .md).

    Args:
        findings: of the static side, as JSON: severity, id, summary, why, fix, nodes.
        workflow: what the workflow is called.

    Raises ValueError for another suffix, FileNotFoundError if the directory does not exist.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".html", ".htm"):
        write_atomic(path, _html(run, findings, workflow).encode())
    elif suffix in (".md", ".markdown"):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"--report: the directory {str(path.parent)!r} does not exist")
        folder = path.with_name(f"{path.stem}_pictures")
        if run.pictures:
            folder.mkdir(exist_ok=True)
        for test, data in run.pictures.items():
            write_atomic(folder / f"{test}.png", _thumbnail(data))
        write_atomic(path, _markdown(run, findings, workflow, folder.name).encode())
    else:
        raise invalid("--report", repr(str(path)), "a name that ends in .html or .md")


def _thumbnail(data: bytes, form: str = "PNG") -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
        small.thumbnail((_LARGEST, _LARGEST))
        buffer = io.BytesIO()
        small.save(buffer, form, quality=90, optimize=True)
    return buffer.getvalue()


def _heading(run: Run) -> str:
    fault = run.verdict.fault
    return {"none": "No fault", "undecided": "Undecided"}.get(fault, f"Fault: {fault.replace('_', ' ')}")


def _note(run: Run) -> str | None:
    if run.interrupted:
        return "The run was interrupted; this is what was measured until then."
    return f"The run stopped: {run.stopped}" if run.stopped else None


def _outcome(row: Row) -> str:
    return _KINDS[row.kind or row.status]


def _numbers(row: Row) -> list[tuple[str, str]]:
    """Name and value of what was measured."""
    m = row.measures
    if m is None:
        return []
    found = [
        ("size", f"{m.width} x {m.height}"),
        ("flatness", f"{m.flatness:.3f} (noise above {m.noise_above:.2f}, picture below {m.picture_below:.2f})"),
        ("slope", f"{m.slope:+.2f} ± {m.slope_error:.2f}"),
        ("below 8 px", f"{100 * m.fine:.0f} % of the variance"),
        ("left | right mean", f"{m.left[0]:.3f} | {m.right[0]:.3f}"),
        ("left | right contrast", f"{m.left[1]:.3f} | {m.right[1]:.3f}"),
        ("halves apart by", f"{m.halves:.2f} sd" + (" (they differ)" if m.halves_differ else "")),
    ]
    if row.difference is not None:
        found.append(("from the workflow's", "nothing" if row.difference == 0 else f"{row.difference:.4f} rms"))
    if row.seconds is not None:
        found.append(("took", f"{row.seconds:.1f} s"))
    return found


def _why(row: Row) -> str | None:
    if row.why is None:
        return None
    return f"{row.why}; see {row.same_as}" if row.same_as else row.why


def _surroundings(run: Run) -> list[tuple[str, str]]:
    rows = [(str(name), said(value)) for name, value in (run.environment.get("facts") or {}).items()]
    unknown = run.environment.get("unknown") or {}
    return rows + [(str(name), f"unknown; to find out: {where}") for name, where in unknown.items()]


# ---- HTML

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:24px;color:#1d2330;background:#fff}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:32px 0 8px}
.verdict{border-left:6px solid #8a8f9c;background:#f4f5f8;padding:12px 16px;margin:16px 0}
.verdict.fault{border-color:#c8372d}.verdict.none{border-color:#2e8b57}
.note{background:#fff6dc;padding:8px 16px}.dim{color:#5d6473}
.tests{display:grid;grid-template-columns:repeat(auto-fill,minmax(265px,1fr));gap:16px}
.test{border:1px solid #d9dce3;border-radius:6px;padding:10px;overflow-wrap:anywhere}
.test h3{font-size:15px;margin:0}.test img{width:100%;display:block;margin:8px 0;background:#eee}
.tag{float:right;font-size:12px;padding:1px 8px;border-radius:9px;background:#e6e8ee}
.tag.picture{background:#cdebd9}.tag.noise,.tag.blank,.tag.failed{background:#f6d0cc}.tag.unclear{background:#fbe8b5}
table{border-collapse:collapse;font-size:13px}td,th{text-align:left;vertical-align:top;padding:2px 12px 2px 0}
ul{margin:4px 0;padding-left:20px}pre{font-size:12px;overflow:auto;background:#f4f5f8;padding:8px;max-height:260px}
@media (prefers-color-scheme:dark){body{background:#15181f;color:#e4e7ee}.verdict,pre{background:#20242e}
.test{border-color:#3a4050}.dim{color:#9aa2b3}.tag{color:#1d2330}.note{color:#1d2330}}
"""


def _html(run: Run, findings: Sequence[Mapping[str, Any]], workflow: str) -> str:
    e = html.escape
    verdict = run.verdict
    colour = "none" if verdict.fault == "none" else "" if verdict.fault == "undecided" else "fault"
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>{e(_heading(run))}: {e(workflow)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{e(_heading(run))}</h1><p class=dim>{e(workflow)} on {e(str(run.environment.get('address', '')))}</p>",
    ]
    note = _note(run)
    if note:
        parts.append(f"<p class=note>{e(note)}</p>")
    parts.append(f'<div class="verdict {colour}"><b>{e(verdict.summary)}</b>')
    parts.append(_list("What to do", verdict.advice) + _list("Evidence", verdict.evidence))
    parts.append(_list("Not run yet", verdict.missing) + "</div>")
    parts.append("<h2>Tests</h2><div class=tests>")
    for row in run.rows:
        parts.append(f'<section class=test id="{e(row.test)}"><span class="tag {e(row.kind or row.status)}">')
        parts.append(f"{e(_outcome(row))}</span><h3>{e(row.test)}</h3><div class=dim>{e(TESTS[row.test])}</div>")
        data = run.pictures.get(row.test)
        if data is not None:
            text = base64.b64encode(_thumbnail(data, "JPEG")).decode()
            parts.append(f'<img alt="{e(row.test)}: {e(_outcome(row))}" src="data:image/jpeg;base64,{text}">')
        why = _why(row)
        if why:
            parts.append(f"<p>{e(why)}</p>")
        parts.append(_list("Changed", row.changes))
        parts.append(_table(_numbers(row)))
        if row.log:
            parts.append(f"<details><summary>log</summary><pre>{e(chr(10).join(row.log))}</pre></details>")
        parts.append("</section>")
    parts.append("</div>")
    if findings:
        parts.append("<h2>Findings in the workflow</h2><table>")
        for one in findings:
            text = (
                f"<b>{e(str(one['summary']))}</b><br>{e(str(one.get('why', '')))}<br>Fix: {e(str(one.get('fix', '')))}"
            )
            parts.append(
                f"<tr><td>{e(str(one['severity']))}</td><td><code>{e(str(one['id']))}</code></td><td>{text}</td></tr>"
            )
        parts.append("</table>")
    parts.append(f"<h2>Server</h2>{_table(_surroundings(run))}")
    o = run.official
    baseline = f"{o.size[0]} x {o.size[1]}, {o.steps} steps, CFG {o.cfg}, {o.sampler}, {o.scheduler}"
    sources = "How the numbers are made: anima_fast/doctor/measure.py; the tree: anima_fast/doctor/verdict.py."
    parts.append(f"<p class=dim>Baseline: {e(baseline)}. {sources}</p></body></html>")
    return "\n".join(parts) + "\n"


def _list(title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<div>{html.escape(title)}:<ul>{items}</ul></div>" if items else ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>" if cells else ""


# ---- Markdown


def _markdown(run: Run, findings: Sequence[Mapping[str, Any]], workflow: str, folder: str) -> str:
    m = _escape
    verdict = run.verdict
    lines = [f"# {m(_heading(run))}", "", f"{m(workflow)} on {m(str(run.environment.get('address', '')))}", ""]
    note = _note(run)
    if note:
        lines += [f"> {m(note)}", ""]
    lines += [f"**{m(verdict.summary)}**", ""]
    for title, texts in (
        ("What to do", verdict.advice),
        ("Evidence", verdict.evidence),
        ("Not run yet", verdict.missing),
    ):
        if texts:
            lines += [f"{title}:", "", *(f"- {m(text)}" for text in texts), ""]
    lines += ["## Tests", ""]
    shown = [row for row in run.rows if row.test in run.pictures]
    for start in range(0, len(shown), 4):
        group = shown[start : start + 4]
        lines.append("| " + " | ".join(f"{row.test}: {_outcome(row)}" for row in group) + " |")
        lines.append("|" + "---|" * len(group))
        lines.append("| " + " | ".join(f"![{row.test}]({_address(folder)}/{row.test}.png)" for row in group) + " |")
        lines.append("")
    lines += [
        "| test | result | flatness | slope | halves | from the workflow's | changed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run.rows:
        n = row.measures
        numbers = ["", "", ""] if n is None else [f"{n.flatness:.3f}", f"{n.slope:+.2f}", f"{n.halves:.2f}"]
        changed = "; ".join(row.changes) or _why(row) or ""
        difference = "" if row.difference is None else f"{row.difference:.4f}"
        cells = [f"**{row.test}**: {TESTS[row.test]}", _outcome(row), *numbers, difference, m(changed)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for row in run.rows:
        if row.log:
            lines += [f"Log of {row.test}:", "", *(f"    {line}" for line in row.log), ""]
    if findings:
        lines += ["## Findings in the workflow", "", "| severity | id | what | fix |", "|---|---|---|---|"]
        for one in findings:
            cells = [m(str(one.get(name, ""))) for name in ("severity", "id", "summary", "fix")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Server", "", "| | |", "|---|---|"]
    lines += [f"| {m(name)} | {m(value)} |" for name, value in _surroundings(run)]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Nothing in it is markup, and it stays on its line of a table."""
    for letter in "\\`*_[]<>|#":
        text = text.replace(letter, f"\\{letter}" if letter != "<" else "&lt;")
    return " ".join(text.split())


def _address(name: str) -> str:
    from urllib.parse import quote

    return quote(name)
