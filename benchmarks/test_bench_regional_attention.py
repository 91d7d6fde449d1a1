"""`pytest benchmarks`: regional attention and its peers under pytest-benchmark.

The problems, the contenders and the check before timing are those of `anima-fast bench attention`
(anima_fast/bench/), which times them interleaved and is what reported figures come from. This suite is for following
one contender over commits: `pytest benchmarks -k "cpu and hard" --benchmark-autosave --benchmark-compare`.
"""

from __future__ import annotations

import functools

import pytest
import torch

from anima_fast.bench.cases import MODES, Case, Problem
from anima_fast.bench.machine import describe
from anima_fast.bench.measure import Oracle, peak_bytes
from anima_fast.bench.peers import contenders

# Warnings are errors in our tests; those of torch.compile are about its own insides.
pytestmark = pytest.mark.filterwarnings("default")

CASES = {mode: Case(mode=mode) for mode in MODES}


@functools.lru_cache(maxsize=1)
def problem_and_oracles(mode: str) -> tuple[Problem, dict[bool, Oracle]]:
    problem = CASES[mode].build()
    return problem, {True: Oracle(problem), False: Oracle(problem.plain)}


@pytest.fixture(scope="session")
def machine():
    return describe()


@pytest.mark.parametrize(
    ("mode", "contender"),
    [
        pytest.param(mode, contender, id=f"{mode}-{contender.name}")
        for mode in MODES
        for contender in contenders()
        if mode in contender.modes and contender.name != "reference"
    ],
)
def test_bench_regional_attention(benchmark, machine, mode, contender):
    problem, oracles = problem_and_oracles(mode)
    reason = contender.needs(problem)
    if reason:
        pytest.skip(f"not executed: {reason}")
    with torch.no_grad():
        prepared = contender.prepare(problem)
        error, bound, wrong = oracles[contender.regional].check(prepared.call(), problem, contender.nrmse)
        assert wrong is None, f"{contender.name} on {problem.title}: {wrong}"
        extra = prepared.held + peak_bytes(prepared.call, problem.q.device)
        benchmark.group = problem.title
        benchmark.extra_info.update(
            machine=machine,
            error=error,
            allowed=bound,
            extra_bytes=extra,
            share_of_padded_mask=extra / problem.padded_mask_bytes,
        )
        benchmark.pedantic(synchronized(prepared.call, problem.q.device), rounds=5, warmup_rounds=1)


def synchronized(call, device):
    def run():
        out = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out

    return run
