"""The head, from the model's width to the adapter's: Linear -> norm -> SiLU -> Linear.

    y = W₃ silu(s(w) · h / RMS(h)) + b₃,    h = W₀ x + b₀,    RMS(h) = sqrt(mean(h²) + eps)

The norm's weights w lie around 0, so the factor cannot be w itself (that would scale everything to nothing). Two
readings keep near-zero weights near the identity: s(w) = exp(w), found by the checkpoint's users, and s(w) = 1 + w, as
all norms of Qwen3.5 have it. They differ by about w²/2: `norm_report` tells how far on given weights.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..errors import invalid
from .files import HEAD_NORMS

__all__ = ["ExpRMSNorm", "Head", "log_norm", "norm_report"]

_log = logging.getLogger("anima_fast.encoder")


class ExpRMSNorm(nn.Module):
    """RMSNorm whose weight 0 means a factor of 1: `s(w) · x / sqrt(mean(x²) + eps)` over the last axis, in fp32.

    Args:
        size: of the last axis.
        parametrisation: "exp": s(w) = exp(w); "one_plus": s(w) = 1 + w.
        eps: added to the mean square.

    Example:
        >>> norm = ExpRMSNorm(1024)             # weight 0
        >>> norm(torch.randn(1, 77, 1024)).pow(2).mean(-1)          # 1 for every token
    """

    def __init__(self, size: int, parametrisation: str = "exp", eps: float = 1e-6, **factory: Any) -> None:
        super().__init__()
        if parametrisation not in HEAD_NORMS:
            raise invalid("head_norm", repr(parametrisation), "'exp' | 'one_plus'")
        self.parametrisation = parametrisation
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size, **factory), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide, weight = x.float(), self.weight.to(x.device).float()
        factor = weight.exp() if self.parametrisation == "exp" else 1 + weight
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * factor).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.parametrisation}, eps={self.eps}"


class Head(nn.Sequential):
    """The checkpoint's `norm`: 0 Linear, 1 ExpRMSNorm, 2 SiLU, 3 Linear. `linear(inputs, outputs)` makes a Linear."""

    def __init__(self, hidden: int, size: int, parametrisation: str, eps: float, linear: Any = nn.Linear) -> None:
        super().__init__(
            linear(hidden, size, bias=True),
            ExpRMSNorm(size, parametrisation, eps),
            nn.SiLU(),
            linear(size, size, bias=True),
        )


def norm_report(weight: torch.Tensor) -> dict[str, float]:
    """How far the two parametrisations are apart on a norm's weights.

    Returns:
        mean, rms and max_abs of w; difference = max |exp(w) − (1 + w)|; relative = the same over exp(w).
    """
    w = weight.detach().double()
    difference = (w.exp() - 1 - w).abs()
    return {
        "mean": float(w.mean()),
        "rms": float(w.square().mean().sqrt()),
        "max_abs": float(w.abs().max()),
        "difference": float(difference.max()),
        "relative": float((difference / w.exp()).max()),
    }


def log_norm(weight: torch.Tensor) -> dict[str, float]:
    """`norm_report`, told to the log of a program that loads an encoder."""
    report = norm_report(weight)
    _log.info(
        "head norm: weights of mean %.4f, at most %.4f; exp(w) and 1 + w differ by at most %.1e",
        report["mean"],
        report["max_abs"],
        report["difference"],
    )
    return report
