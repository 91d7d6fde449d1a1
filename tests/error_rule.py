"""Holding results to the error rule, anima_fast/reference/error_rule.py."""

from __future__ import annotations

import torch

from anima_fast.reference.error_rule import error_bound


def assert_error_rule(
    out: torch.Tensor,
    oracle: torch.Tensor,
    reference: torch.Tensor,
    *,
    score: float = 0.0,
    value: float = 0.0,
    what: str = "",
) -> None:
    """Fail, saying `what` broke it, where `out` misses the error rule or holds a NaN that the oracle lacks."""
    assert out.shape == oracle.shape, f"{what}: shape {list(out.shape)}, expected {list(oracle.shape)}"
    bound = error_bound(oracle, reference, out.dtype, score=score, value=value)
    error = (out.double() - oracle).abs()
    wrong = (error > bound) | (out.isnan() & ~oracle.isnan())
    if bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: error {float(error.nan_to_num(torch.inf).max()):.3g} exceeds {bound:.3g}; "
            f"{int(wrong.sum())} of {out.numel()} values, first at {first}: {float(out[first]):.6g} "
            f"instead of {float(oracle[first]):.6g}"
        )
