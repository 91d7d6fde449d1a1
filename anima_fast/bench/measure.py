"""Measuring contenders on an attention case: first correct, then fast (rounds.py).

A result is held to the error rule (anima_fast/reference/error_rule.py), where the oracle is the `reference` backend in
fp64 on the *padded* problem, in which pads are ordinary rows: folding them is checked too.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..bound_plan import PlanTensors
from ..reference.error_rule import error_bound
from ..reference.regional_attention import regional_attention as reference_attention
from .cases import Problem
from .peers import Contender, Prepared
from .rounds import Progress, Result, document, peak_bytes, run_rounds, timed

__all__ = ["FORMAT", "Oracle", "Result", "measure", "peak_bytes", "report"]

FORMAT = "anima_fast.bench.attention/1"

# Scores that the oracle forms, heads x queries x keys: a second or so in fp64. More queries than that are sampled.
_ORACLE_SCORES = 2**27


class Oracle:
    """The fp64 result of a problem for some heads and queries, and the error it allows."""

    def __init__(self, problem: Problem) -> None:
        q, k, v = problem.q, problem.k, problem.v
        heads = sorted({0, q.shape[1] - 1})
        step = -(-len(heads) * q.shape[2] * k.shape[2] // _ORACLE_SCORES)
        queries = torch.arange(0, q.shape[2], step, device=q.device)
        self.heads = torch.tensor(heads, device=q.device)
        self.queries = torch.cat([queries, queries.new_tensor([q.shape[2] - 1])]).unique()
        self.expected = self._attend(problem, torch.float64)
        same = self._attend(problem, q.dtype)
        scores = q[:, self.heads][:, :, self.queries[:256]].double() @ k[:, self.heads].double().transpose(2, 3)
        score = float(scores.abs().max()) * q.shape[3] ** -0.5
        self.bound = error_bound(self.expected, same, q.dtype, score=score, value=float(v.abs().max()))

    def _attend(self, problem: Problem, dtype: torch.dtype) -> torch.Tensor:
        t = problem.plan.tensors
        segments = [x for start, _, end in problem.spans for x in (start, end, 0)]
        k, v = (x[:, self.heads].to(dtype) for x in (problem.k, problem.v))
        parts = []
        for rows in self.queries.split(1024):
            plan = PlanTensors(
                bias=t.bias[:, :, rows] if t.bias.shape[2] else t.bias,
                order=t.order[:, :0],
                segments=torch.tensor(segments, dtype=torch.int32).view(1, -1, 3),
                plan_index=t.plan_index,
                segments_host=tuple(segments),
                plan_index_host=(0,),
                groups_host=(),
            )
            q = problem.q[:, self.heads][:, :, rows].to(dtype)
            out = torch.empty_like(q)
            scale = q.shape[3] ** -0.5
            reference_attention(q, k, v, out, None, plan, scale=scale, combine=problem.plan.combine, mask=None)
            parts.append(out)
        return torch.cat(parts, dim=2)

    def check(self, out: torch.Tensor, problem: Problem, nrmse: float | None) -> tuple[float, float, str | None]:
        """The error of a result, what is allowed, and what is wrong with it, if anything."""
        if out.shape != problem.q.shape or out.dtype != problem.q.dtype:
            got, want = f"{out.dtype} {list(out.shape)}", f"{problem.q.dtype} {list(problem.q.shape)}"
            return float("inf"), self.bound, f"gave {got} instead of {want}"
        difference = out[:, self.heads][:, :, self.queries].double() - self.expected
        if nrmse is None:
            error, bound = float(difference.abs().max()), self.bound
        else:
            error, bound = float(difference.norm() / self.expected.norm()), nrmse
        if not bool(torch.isfinite(out).all()):
            return float("nan"), bound, "gave values that are not finite"
        return error, bound, None if error <= bound else f"error {error:.3g} exceeds {bound:.3g}"


def measure(
    problem: Problem, contenders: Sequence[Contender], rounds: int, progress: Progress = lambda what: None
) -> list[Result]:
    """Check and time the contenders that compute this problem's mode; `progress` hears of each step."""
    oracles: dict[bool, Oracle] = {}
    results: list[Result] = []
    running: list[tuple[Result, Prepared]] = []
    with _fresh_compiler_cache(), torch.no_grad():
        for contender in contenders:
            if problem.mode not in contender.modes:
                continue
            progress(f"checking {contender.name}")
            result = Result(contender.name, contender.kind, contender.summary, "not executed")
            results.append(result)
            result.reason = contender.needs(problem)
            if result.reason is not None:
                continue
            if contender.regional not in oracles:
                oracles[contender.regional] = Oracle(problem if contender.regional else problem.plain)
            prepared = contender.prepare(problem)
            result.cold_ms, out = timed(prepared.call, problem.q.device)
            checked = oracles[contender.regional].check(out, problem, contender.nrmse)
            result.error, result.bound, result.reason = checked
            if result.reason is not None:
                result.status = "gate failed"
                continue
            result.held_bytes = prepared.held
            del out
            result.peak_bytes = peak_bytes(prepared.call, problem.q.device)
            result.status = "measured"
            running.append((result, prepared))
        run_rounds([(result, _sampler(prepared, problem)) for result, prepared in running], rounds, progress)
    return results


def report(measured: Sequence[tuple[dict[str, Any], Problem, list[Result]]], rounds: int) -> dict[str, Any]:
    """Everything that was measured, and on what, as plain data; each problem with a description of it."""
    return document(
        FORMAT,
        rounds,
        cases=[
            {
                "title": problem.title,
                **description,
                "mode": problem.mode,
                "queries": problem.plan.queries,
                "rows": problem.k.shape[2],
                "prompts": len(problem.spans),
                "padded_mask_bytes": problem.padded_mask_bytes,
                "results": [_as_dict(result, problem) for result in results],
            }
            for description, problem, results in measured
        ],
    )


def _as_dict(result: Result, problem: Problem) -> dict[str, Any]:
    extra = result.extra_bytes
    return {**result.as_dict(), "share_of_padded_mask": None if extra is None else extra / problem.padded_mask_bytes}


def _sampler(prepared: Prepared, problem: Problem) -> Callable[[], float]:
    return lambda: timed(prepared.call, problem.q.device)[0]


@contextlib.contextmanager
def _fresh_compiler_cache() -> Iterator[None]:
    """An empty cache for torch.compile, so that a cold call is cold on its second run too."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.environ[name] = directory
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before
