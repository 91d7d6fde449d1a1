"""`anima-fast bench attention`: every backend and every peer on the same problems, as a table, JSON and a plot."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ..bench.cases import MODES, Case, Problem
from ..bench.measure import Result, measure, report
from ..bench.peers import Contender, backends, peers
from ..bench.rounds import Progress
from ..errors import invalid
from ..files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "check_device",
    "check_files",
    "choose",
    "default_device",
    "draw",
    "measure_with_bar",
    "progress_bar",
    "pyplot",
    "run",
    "table",
    "text_columns",
    "write_report",
]

# The oracle itself is timed only if it is named: it materialises every score.
_NOT_BY_DEFAULT = ("reference",)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_Named)


def run(options: argparse.Namespace) -> int:
    """Exit code 1 if a contender failed the gate."""
    contenders = [
        *choose("--backends", backends(), options.backends, _NOT_BY_DEFAULT),
        *choose("--peers", peers(), options.peers, ()),
    ]
    if not contenders:
        raise invalid("--backends, --peers", "nothing to measure", "at least one name")
    cases = [
        Case(
            mode=mode,
            width=width,
            height=height,
            layout=options.layout,
            regions=options.regions,
            tokens=options.tokens,
            pad_to=options.pad_to,
            heads=options.heads,
            head_dim=options.head_dim,
            dtype=options.dtype,
            device=check_device(options.device),
        )
        for width, height in options.size or [(1024, 1024)]
        for mode in (MODES if options.mode == "all" else (options.mode,))
    ]
    check_files(options.json, options.plot)
    if options.plot:
        pyplot()
    done = []
    for case in cases:
        problem = case.build()
        results = measure_with_bar(problem, contenders, options.rounds)
        done.append(({**dataclasses.asdict(case), "regions": case.region_count}, problem, results))
        if options.json != "-":
            print(table(problem, results), end="\n\n", flush=True)
    document = report(done, options.rounds)
    write_report(document, options.json)
    if options.plot:
        draw(document, options.plot)
    failed = [result.name for _, _, results in done for result in results if result.status == "gate failed"]
    if failed:
        print(f"anima-fast bench: failed the gate, not timed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def check_files(*names: str | None) -> None:
    """That results can be written there, before they are measured."""
    for name in names:
        if name not in (None, "-") and not Path(name).resolve().parent.is_dir():
            raise FileNotFoundError(f"{name}: its directory does not exist")


def write_report(document: dict[str, Any], where: str | None) -> None:
    """To a file, or for "-" to stdout; unless it is there, the machine's line follows the tables."""
    if where == "-":
        print(json.dumps(document, indent=1))
        return
    if where:
        write_atomic(where, json.dumps(document, indent=1).encode())
    machine = document["machine"]
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, anima_fast "
        f"{machine['anima_fast']} ({machine['commit'] or 'installed'}), median of {document['rounds']} rounds"
    )


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Progress]:
    """A function that moves a bar on by one step, on a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(what: str) -> None:
            bar.set_description(f"{title}, {what}")
            bar.update()

        yield progress


def measure_with_bar(problem: Problem, contenders: Sequence[Contender], rounds: int) -> list[Result]:
    """`measure` with a progress bar on a terminal."""
    runs = sum(problem.mode in contender.modes for contender in contenders)
    # Those that turn out not to run here leave the bar short of its end; it vanishes then.
    with progress_bar(problem.mode, runs * (1 + rounds)) as progress:
        return measure(problem, contenders, rounds, progress)


def choose(
    option: str, known: Iterable[Named], names: list[str] | None, not_by_default: tuple[str, ...]
) -> list[Named]:
    """Those that an option names, or all but some."""
    by_name = {contender.name: contender for contender in known}
    if names is None:
        return [c for name, c in by_name.items() if name not in not_by_default]
    for name in names:
        if name not in by_name:
            raise invalid(option, repr(name), " | ".join(by_name))
    return [by_name[name] for name in dict.fromkeys(names)]


def default_device() -> str:
    """A GPU if there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> str:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise invalid("--device", repr(name), f"a device of this torch ({str(error).splitlines()[0]})") from error
    return name


def table(problem: Problem, results: list[Result]) -> str:
    """The results of one problem as text: times, also as multiples of each backend's, memory, error."""
    ours = [r for r in results if r.kind == "backend" and r.median_ms is not None and r.name != "reference"]
    head = ["", "warm ms", *(f"/ {r.name}" for r in ours), "cold ms", "extra MiB", "of padded mask", "error", "allowed"]
    rows, notes = [head], []
    for r in results:
        if r.status != "measured":
            notes.append(f"  {r.name}: {r.status} ({r.reason})")
            continue
        assert r.median_ms is not None and r.cold_ms is not None and r.extra_bytes is not None
        rows.append(
            [
                r.name,
                f"{r.median_ms:.1f}",
                *(f"{r.median_ms / (own.median_ms or 1):.2f}x" for own in ours),
                f"{r.cold_ms:.0f}",
                f"{r.extra_bytes / 2**20:.1f}",
                f"{100 * r.extra_bytes / problem.padded_mask_bytes:.1f} %",
                f"{r.error:.1e}",
                f"{r.bound:.1e}",
            ]
        )
    return "\n".join([problem.title, *text_columns(rows), *notes])


def text_columns(rows: list[list[str]]) -> list[str]:
    """Rows of text as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return lines


def pyplot() -> Any:
    """matplotlib's, for drawing into files. Raises ValueError when it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise invalid("--plot", "no matplotlib", "pip install 'anima-fast[bench]', or no --plot") from error
    matplotlib.use("Agg")  # a file is drawn; there may be no display
    return importlib.import_module("matplotlib.pyplot")


def _quartile(result: dict[str, Any], which: int) -> float:
    samples = result["samples_ms"]
    return statistics.quantiles(samples, n=4, method="inclusive")[which] if len(samples) > 1 else samples[0]


_OURS, _PEER, _INK = "#2f6fde", "#b8bec9", "#22262e"


def draw(document: dict[str, Any], path: str) -> None:
    """The report as a picture: for each case, warm time and peak extra memory of each contender."""
    cases = [case for case in document["cases"] if any(r["status"] == "measured" for r in case["results"])]
    if not cases:
        raise invalid("--plot", "no contender that was measured", "at least one")
    counts = [sum(r["status"] == "measured" for r in case["results"]) for case in cases]
    figure, grid = pyplot().subplots(
        len(cases),
        2,
        squeeze=False,
        figsize=(11, sum(1.35 + 0.33 * count for count in counts)),
        height_ratios=[1.35 + 0.33 * count for count in counts],
        layout="constrained",
    )
    for case, (left, right) in zip(cases, grid, strict=True):
        measured = [r for r in case["results"] if r["status"] == "measured"]
        measured.sort(key=lambda r: r["median_ms"], reverse=True)
        regions = "" if case["mode"] == "plain" else f" · {case['regions']} regions, {case['layout']}"
        title = f"{case['mode']} · {case['width']}×{case['height']}{regions} · {case['dtype']} · {case['device']}"
        _bars(left, measured, "median_ms", 1, "ms", "{:.0f}")
        _bars(right, measured, "extra_bytes", 2**20, "MiB", "{:.1f}")
        spread = [[r["median_ms"] - _quartile(r, 0), _quartile(r, 2) - r["median_ms"]] for r in measured]
        medians = [r["median_ms"] for r in measured]
        errors = list(zip(*spread, strict=True))
        left.errorbar(medians, range(len(measured)), xerr=errors, fmt="none", ecolor=_INK, elinewidth=0.8, capsize=2)
        left.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
        right.set_title("memory beyond q, k, v and the output", loc="left", fontsize=10, color=_INK)
    grid[-1, 0].set_xlabel("time of a call, ms: median, whiskers to the quartiles", fontsize=8)
    grid[-1, 1].set_xlabel("MiB", fontsize=8)
    machine = document["machine"]
    where = machine["cpu"] if cases[0]["device"] == "cpu" else machine["devices"][0]["name"]
    figure.suptitle(
        f"{where}, {machine['threads']} threads, torch {machine['torch']}, {document['rounds']} rounds, "
        f"{document['date'][:10]}. Blue: backends of anima_fast; grey: what people use today",
        fontsize=8,
        color="#6b7280",
    )
    figure.savefig(path, dpi=160)
    pyplot().close(figure)


def _bars(axes: Axes, results: list[dict[str, Any]], key: str, unit: float, name: str, form: str) -> None:
    values = [r[key] / unit for r in results]
    colours = [_OURS if r["kind"] == "backend" else _PEER for r in results]
    axes.barh(range(len(values)), values, color=colours, height=0.72)
    axes.set_yticks(range(len(values)), [r["name"] for r in results], fontsize=9)
    ends = [_quartile(r, 2) for r in results] if key == "median_ms" else values
    longest = max(ends)
    for position, (value, end) in enumerate(zip(values, ends, strict=True)):
        text = f"{form.format(value)} {name}"
        axes.text(end + 0.012 * longest, position, text, va="center", fontsize=8, color=_INK)
    axes.set_xlim(0, 1.18 * (longest or 1))
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
