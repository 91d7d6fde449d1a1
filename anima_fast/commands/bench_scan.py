"""`anima-fast bench scan`: every backend and every peer on recurrences, as tables and JSON."""

from __future__ import annotations

import argparse
import math
import sys

from ..bench.rounds import Result
from ..bench.scan_cases import CHUNK, OPS, SHAPES, Case, Shape, parse_shape
from ..bench.scan_measure import Measured, measure, report
from ..bench.scan_models import MODELS, ModelResults, measure_models
from ..bench.scan_peers import Contender, backends, peers
from ..errors import invalid
from .bench import check_device, check_files, choose, progress_bar, text_columns, write_report

__all__ = ["linear_table", "model_table", "run", "table"]

_SHAPES = ("mamba2-2.7b", "mamba2-codestral", "encoder-mamba2", "qwen3.5-4b")
_LENGTHS = (77, 512, 1024)
_MODEL_LENGTHS = (77, 512)
_LINEAR_SHAPES = ("ssd:8,64,128,1", "delta:8,128,128,4")
_LINEAR_LENGTHS = (1024, 4096, 16384, 65536)
_LINEAR_OPS = ("ssd_chunk_scan", "gated_delta_rule")
_LINEAR_PEERS = ["transformers_64", "transformers"]

_FORMULAS = f"""operations that are counted, chunk q = {CHUNK} (the last shorter), causal products on their triangle:
  ssd_chunk_scan    sum over chunks of q H (4 N P + q P) + q G q N         C.S, state update; M x; C.B
  gated_delta_rule  sum over chunks of q Hv (6 K V + 2 q V) + q Hk 2 q K   k.S, q.S, state update; M d, solve; k.k, q.k
  without the products with S of the first chunk, where S = 0, and without the last chunk's state update if no final
  state is asked for. "of mm" is over the best torch.mm in fp32 on squares, timed around and between the rounds: a
  yardstick, not the machine's limit: torch's matmul is not the fastest on every processor. On a busy machine it
  says nothing"""


def run(options: argparse.Namespace) -> int:
    """Exit code 1 if a contender failed the gate."""
    device = check_device(options.device)
    check_files(options.json)
    quiet = options.json == "-"
    if options.models:
        return _run_models(options, device, quiet)
    contenders: list[Contender] = [
        *choose("--backends", backends(), options.backends, ("reference",)),
        *choose("--peers", peers(), _LINEAR_PEERS if options.linear and options.peers is None else options.peers, ()),
    ]
    cases = [c for c in _cases(options, device) if any(c.op in contender.ways for contender in contenders)]
    if not cases:
        raise invalid("--ops, --shapes, --backends, --peers", "nothing to measure", "ops, shapes and names that fit")
    done: list[Measured] = []
    for case in cases:
        steps = sum(case.op in c.ways for c in contenders) * (1 + options.rounds) + options.rounds
        with progress_bar(f"{case.op} L {case.length}", steps) as progress:
            done.append(measure(case, contenders, options.rounds, progress))
        if not quiet:
            print(table(done[-1]), end="\n\n", flush=True)
    if not quiet:
        if options.linear:
            print(linear_table(done), end="\n\n")
        if any(m.operations is not None for m in done):
            print(_FORMULAS, end="\n\n")
    write_report(report(done, options.rounds), options.json)
    return _exit_code([r for m in done for r in m.results])


def _run_models(options: argparse.Namespace, device: str, quiet: bool) -> int:
    for name, value, default in (("--dtype", options.dtype, "fp32"), ("--shapes", options.shapes, None)):
        if value != default:
            raise invalid(name, value, "nothing with --models, whose stacks are fixed and fp32")
    lengths = options.lengths or _MODEL_LENGTHS
    with progress_bar("models", 2 * len(MODELS) * len(lengths) * (1 + options.rounds)) as progress:
        models = measure_models(lengths, options.rounds, device, progress)
    if not quiet:
        for model in models:
            print(model_table(model), end="\n\n")
    write_report(report([], options.rounds, [m.as_dict() for m in models]), options.json)
    return _exit_code([r for m in models for r in m.results])


def _cases(options: argparse.Namespace, device: str) -> list[Case]:
    names = options.shapes or (_LINEAR_SHAPES if options.linear else _SHAPES)
    shapes: dict[Shape, str] = {}
    for name in names:
        for each in SHAPES if name == "all" else (name,):
            shapes.setdefault(parse_shape(each), each if each in SHAPES else "")
    ops = [op for op in OPS if op in options.ops and (op in _LINEAR_OPS or not options.linear)]
    lengths = options.lengths or (_LINEAR_LENGTHS if options.linear else _LENGTHS)
    return [
        Case(op, shape, length, options.dtype, device, not options.no_final_state, name)
        for op in ops
        for shape, name in shapes.items()
        if shape.family in OPS[op][0]
        for length in (lengths if OPS[op][1] else (1,))
    ]


def _exit_code(results: list[Result]) -> int:
    failed = [result.name for result in results if result.status == "gate failed"]
    if failed:
        print(f"anima-fast bench: failed the gate, not timed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _number(value: float) -> str:
    """Three digits, or as many as the whole part has and one more: steps take microseconds, naive loops minutes."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 1
    return f"{value:.{min(5, max(1, digits))}f}"


def table(measured: Measured) -> str:
    """One case as text: times, also as multiples of each backend's, memory, rate beside torch.mm, error."""
    results = measured.results
    ours = [r for r in results if r.kind == "backend" and r.median_ms is not None and r.name != "reference"]
    counted = measured.operations is not None
    head = ["", "warm ms", *(f"/ {r.name}" for r in ours), "cold ms", "extra MiB"]
    head += [*(["GFLOP/s", "of mm"] if counted else []), "error", "allowed"]
    rows, notes = [head], []
    for r in results:
        if r.status != "measured":
            notes.append(f"  {r.name}: {r.status} ({r.reason})")
            continue
        assert r.median_ms is not None and r.cold_ms is not None and r.extra_bytes is not None
        row = [
            r.name,
            _number(r.median_ms),
            *(f"{r.median_ms / (own.median_ms or 1):.2f}x" for own in ours),
            _number(r.cold_ms),
            f"{r.extra_bytes / 2**20:.1f}",
        ]
        rate = measured.gflops(r)
        if rate is not None:
            row += [f"{rate:.1f}", f"{100 * rate / measured.matmul.best:.1f} %"]
            if rate > measured.matmul.best:
                notes.append(f"  {r.name}: faster than torch.mm here, which is no limit of the machine")
        rows.append([*row, f"{r.error:.1e}", f"{r.bound:.1e}"])
    lines = [str(measured.case)]
    if measured.operations is not None:
        lines.append(
            f"  {measured.operations / 1e9:.3g} GFLOP; torch.mm in fp32: best {measured.matmul.best:.1f}, "
            f"median {measured.matmul.median:.1f} GFLOP/s"
        )
    return "\n".join([*lines, *text_columns(rows), *notes])


def linear_table(measured: list[Measured]) -> str:
    """Time and memory a token as L grows, beside the [L / Q, Q, Q, H] tensor that dense chunks hold."""
    lines = ["linear in L: time a token, and memory beyond inputs and outputs"]
    groups: dict[tuple[str, Shape, str], list[tuple[Measured, Result]]] = {}
    for m in measured:
        for r in m.results:
            if r.median_ms is not None:
                groups.setdefault((m.case.op, m.case.shape, r.name), []).append((m, r))
    rows = [["", "L", "us a token", "of the shortest", "extra MiB", "bytes a token", "[L/Q, Q, Q, H] MiB", "share"]]
    for (op, shape, name), group in groups.items():
        shortest, fastest = group[0]
        assert fastest.median_ms is not None
        for m, result in group:
            assert result.median_ms is not None and result.extra_bytes is not None
            length, extra = m.case.length, result.extra_bytes
            dense = 4 * -(-length // CHUNK) * CHUNK * CHUNK * shape.heads
            growth = (result.median_ms / length) / (fastest.median_ms / shortest.case.length)
            rows.append(
                [
                    f"{op}, {shape}, {name}",
                    str(length),
                    _number(1e3 * result.median_ms / length),
                    f"{growth:.2f}x",
                    f"{extra / 2**20:.1f}",
                    f"{extra / length:.0f}",
                    f"{dense / 2**20:.1f}",
                    f"{100 * extra / dense:.1f} %",
                ]
            )
    return "\n".join([*lines, *text_columns(rows)])


def model_table(measured: ModelResults) -> str:
    """One stack at one length as text: time and tokens/s without and with us, and what the whole model would take."""
    rows, notes = [["", "ms", "tokens/s", "/ off", "difference"]], []
    off = measured.results[0]
    for r in measured.results:
        rate = measured.tokens_per_second(r)
        if r.median_ms is None or rate is None:
            notes.append(f"  {r.name}: {r.status} ({r.reason})")
            continue
        rows.append(
            [
                f"{r.name} ({r.summary})",
                _number(r.median_ms),
                f"{rate:.1f}",
                f"{r.median_ms / (off.median_ms or 1):.2f}x",
                f"{r.error:.1e}",
            ]
        )
        whole = measured.model.times * r.median_ms
        notes.append(f"  {r.name}: {measured.model.times} such stacks, {measured.model.whole}: {_number(whole)} ms")
    return "\n".join([str(measured), *text_columns(rows), *notes])
