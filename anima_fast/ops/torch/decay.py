"""exp of sums of log decays over spans of a chunk, what both chunked scans are made of."""

from __future__ import annotations

import torch


def running_sums(log_decay: torch.Tensor) -> torch.Tensor:
    """Cumulative sums over the last dimension, in fp64.

    Their differences are sums over spans. In fp32 those lose 1e-5 where decays of -1e-6 and -100 mix.
    """
    if log_decay.device.type == "mps":  # has no fp64
        return log_decay.cumsum(-1)
    return log_decay.cumsum(-1, dtype=torch.float64)


def span_decays(sums: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """[..., i, j] = exp(Σ of log decays over (j, i]) in fp32 where allowed [..., i, j], else 0."""
    difference = (sums[..., :, None] - sums[..., None, :]).float()
    return difference.masked_fill_(~allowed, -torch.inf).exp_()


def pieces(length: int, chunk_size: int, most: int) -> list[tuple[int, int, int]]:
    """(start, chunks, tokens a chunk) that cover `length`; at most `most` chunks each, the shorter last one alone."""
    whole = length // chunk_size
    found = [(first * chunk_size, min(most, whole - first), chunk_size) for first in range(0, whole, most)]
    rest = length - whole * chunk_size
    return [*found, (whole * chunk_size, 1, rest)] if rest else found
