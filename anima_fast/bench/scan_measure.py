"""Measuring contenders on a recurrence: first correct, then fast (rounds.py), beside torch.mm.

A result is held to the error rule with the `reference` backend in fp64 as the oracle, for three heads of a sequence
(the others are looked at for values that are not finite); in fp32 with 5e-6 of the largest value on top, as in the
tests. What ours changes in place is a result too. A call of less than 2 ms is repeated within a sample.

Beside them stands torch.mm in fp32 on squares, timed before, in every round of, and after each case; a case's rates are
also given as shares of the best of its own. That is a yardstick and not the machine's limit: a share may exceed 1 (on
an AMD EPYC, one thread, torch.mm gave 95 GFLOP/s and our delta rule 130); and on a busy machine it says nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..reference.error_rule import error_bound
from .rounds import Progress, Result, document, peak_bytes, run_rounds, timed
from .scan_cases import Case, Problem
from .scan_peers import Contender, Prepared

__all__ = ["FORMAT", "Matmul", "Measured", "Oracle", "ScanResult", "measure", "report", "sampler"]

FORMAT = "anima_fast.bench.scan/1"

MATMUL_SIZES = (512, 768, 1024)  # 1024 was no faster than 768
_AROUND = 3
_SAMPLE_MS = 2.0
_MOST_CALLS = 200


@dataclasses.dataclass
class ScanResult(Result):
    calls: int = 1  # in each sample, which is their mean


class Matmul:
    """The rate of torch.mm in fp32, in GFLOP/s."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: list[tuple[int, float]] = []  # (size, GFLOP/s)
        self._squares = [torch.randn(2, size, size, device=device) for size in MATMUL_SIZES]
        for a, b in self._squares:
            torch.mm(a, b)

    def sample(self) -> float:
        """One product of each size; milliseconds in all."""
        total = 0.0
        for pair in self._squares:
            ms, _ = timed(functools.partial(torch.mm, pair[0], pair[1]), self.device)
            self.samples.append((pair.shape[1], 2e-6 * pair.shape[1] ** 3 / ms))
            total += ms
        return total

    @property
    def best(self) -> float:
        return max(rate for _, rate in self.samples)

    @property
    def median(self) -> float:
        """Of the samples of the size that has the best one."""
        best = max(self.samples, key=lambda sample: sample[1])[0]
        return statistics.median(rate for size, rate in self.samples if size == best)

    def as_dict(self) -> dict[str, Any]:
        return {"best_gflops": self.best, "median_gflops": self.median, "samples": self.samples}


class Oracle:
    """The fp64 results of a problem for some heads, and the error each allows."""

    def __init__(self, problem: Problem) -> None:
        part, self.chosen = problem.part()
        self.expected = _results(part, dtype=torch.float64)
        own = _results(part)
        self.dtypes = [x.dtype for x in own]
        self.largest = [float(x.abs().max()) for x in self.expected]
        self.bounds = [
            error_bound(expected, x, x.dtype) + (5e-6 * largest if x.dtype == torch.float32 else 0.0)
            for expected, x, largest in zip(self.expected, own, self.largest, strict=True)
        ]

    def check(
        self, results: tuple[torch.Tensor, ...], problem: Problem, tolerance: float = 0.0
    ) -> tuple[float, float, str | None]:
        """The error of the worst result, what is allowed, and what is wrong with it, if anything; `results` and then
        what `problem` had changed in place."""
        if problem.changed is not None:
            results = (*results, problem.arguments[problem.changed])
        if len(results) != len(self.expected):
            return float("inf"), 0.0, f"gave {len(results)} results instead of {len(self.expected)}"
        if tolerance and problem.first.dtype != torch.float32:
            tolerance = max(tolerance, 0.03)  # others round dt, decays or states to the inputs' type
        selected = problem.select(results, self.chosen)
        worst = (-1.0, 0.0, 0.0)
        for whole, x, expected, dtype, rule, largest in zip(
            results, selected, self.expected, self.dtypes, self.bounds, self.largest, strict=True
        ):
            bound = rule + tolerance * largest
            if x.shape != expected.shape or x.dtype != dtype:
                got, want = f"{x.dtype} {list(x.shape)}", f"{dtype} {list(expected.shape)}"
                return float("inf"), bound, f"gave {got} instead of {want}"
            if not bool(torch.isfinite(whole).all()):
                return float("nan"), bound, "gave values that are not finite"
            error = float((x.double() - expected).abs().max())
            worst = max(worst, (error / bound if bound else math.inf if error else 0.0, error, bound))
        share, error, bound = worst
        return error, bound, None if share <= 1 else f"error {error:.3g} exceeds {bound:.3g}"


def _results(problem: Problem, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """What the reference gives, and what it changes, in fp64 or in the inputs' own type."""
    arguments = {
        name: x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) else x
        for name, x in problem.arguments.items()
    }
    own = dataclasses.replace(problem, arguments=arguments).with_own_state()
    out = own.run("reference")
    return out if own.changed is None else (*out, own.arguments[own.changed])


def sampler(call: Callable[[], Any], device: torch.device, result: ScanResult) -> Callable[[], float]:
    """A function that gives the milliseconds of a call: the mean of as many as take 2 ms, after one to see that."""
    once, _ = timed(call, device)
    result.calls = min(_MOST_CALLS, max(1, math.ceil(_SAMPLE_MS / max(once, 1e-6))))

    def repeated() -> Any:
        for _ in range(result.calls - 1):
            call()
        return call()

    return lambda: timed(repeated, device)[0] / result.calls


@dataclasses.dataclass
class Measured:
    """A case, its problem's size, its results, and torch.mm around and between them."""

    case: Case
    operations: int | None
    results: list[ScanResult]
    matmul: Matmul

    def gflops(self, result: Result) -> float | None:
        if self.operations is None or not result.median_ms:
            return None
        return self.operations / result.median_ms / 1e6

    def as_dict(self) -> dict[str, Any]:
        results = []
        for result in self.results:
            rate = self.gflops(result)
            share = None if rate is None else rate / self.matmul.best
            results.append({**result.as_dict(), "gflops": rate, "share_of_matmul": share})
        case = {**dataclasses.asdict(self.case), "shape": self.case.shape._asdict()}
        return {
            "title": str(self.case),
            **case,
            "operations": self.operations,
            "matmul": self.matmul.as_dict(),
            "results": results,
        }


def measure(
    case: Case, contenders: Sequence[Contender], rounds: int, progress: Progress = lambda what: None
) -> Measured:
    """Check and time the contenders that compute this case's op; `progress` hears of each step."""
    problem = case.build()
    matmul = Matmul(problem.device)
    results: list[ScanResult] = []
    running: list[tuple[Result, Callable[[], float]]] = []
    with torch.no_grad():
        for _ in range(_AROUND):
            matmul.sample()
        oracle = None
        for contender in contenders:
            if case.op not in contender.ways:
                continue
            progress(f"checking {contender.name}")
            result = ScanResult(contender.name, contender.kind, contender.summary(case.op), "not executed")
            results.append(result)
            result.reason = contender.needs(problem)
            if result.reason is not None:
                continue
            oracle = oracle or Oracle(problem)
            own = problem.with_own_state()
            prepared: Prepared = contender.ways[case.op](own)
            result.cold_ms, out = timed(prepared.call, problem.device)
            result.error, result.bound, result.reason = oracle.check(out, own, contender.tolerance)
            if result.reason is not None:
                result.status = "gate failed"
                continue
            del out
            result.held_bytes = prepared.held
            result.peak_bytes = peak_bytes(prepared.call, problem.device)
            result.status = "measured"
            running.append((result, sampler(prepared.call, problem.device, result)))
        run_rounds([*running, (ScanResult("torch.mm", "", "", ""), matmul.sample)], rounds, progress)
        for _ in range(_AROUND):
            matmul.sample()
    return Measured(case, problem.operations, results, matmul)


def report(measured: Sequence[Measured], rounds: int, models: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Everything that was measured, and on what, as plain data."""
    return document(FORMAT, rounds, cases=[m.as_dict() for m in measured], models=list(models))
