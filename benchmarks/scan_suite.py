"""What the suites of the recurrent ops share: the cases, the check before timing, and pytest-benchmark.

The cases, the contenders and the check are those of `anima-fast bench scan` (anima_fast/bench/), which times them
interleaved and is what reported figures come from.
"""

from __future__ import annotations

import functools

import pytest
import torch

from anima_fast.bench.machine import describe
from anima_fast.bench.rounds import peak_bytes, synchronize
from anima_fast.bench.scan_cases import OPS, SHAPES, Case, Problem
from anima_fast.bench.scan_measure import Oracle
from anima_fast.bench.scan_peers import contenders

_SHAPES = ("mamba2-2.7b", "encoder-mamba2", "qwen3.5-4b")
_LENGTHS = (77, 512, 1024)

machine = functools.cache(describe)


def cases(*ops: str) -> list:
    """A parameter (case, contender) for each op, shape, length and whoever computes it."""
    return [
        pytest.param(case, contender, id=f"{op}-{name}-L{case.length}-{contender.name}")
        for op in ops
        for name in _SHAPES
        if SHAPES[name].family in OPS[op][0]
        for case in (Case(op, SHAPES[name], length, name=name) for length in (_LENGTHS if OPS[op][1] else (1,)))
        for contender in contenders()
        if op in contender.ways and contender.name != "reference"
    ]


@functools.lru_cache(maxsize=1)
def problem_and_oracle(case: Case) -> tuple[Problem, Oracle]:
    problem = case.build()
    return problem, Oracle(problem)


def run(benchmark, case: Case, contender) -> None:
    problem, oracle = problem_and_oracle(case)
    reason = contender.needs(problem)
    if reason:
        pytest.skip(f"not executed: {reason}")
    own = problem.with_own_state()
    with torch.no_grad():
        prepared = contender.ways[case.op](own)
        error, bound, wrong = oracle.check(prepared.call(), own, contender.tolerance)
        assert wrong is None, f"{contender.name} on {problem.title}: {wrong}"
        benchmark.group = problem.title
        benchmark.extra_info.update(
            machine=machine(),
            error=error,
            allowed=bound,
            extra_bytes=prepared.held + peak_bytes(prepared.call, problem.device),
            operations=problem.operations,
        )

        def synchronized():
            out = prepared.call()
            synchronize(problem.device)
            return out

        benchmark.pedantic(synchronized, rounds=5, warmup_rounds=1, iterations=1 if OPS[case.op][1] else 20)
