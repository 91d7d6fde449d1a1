"""exp of sums of log decays over spans of a chunk, what both chunked scans are made of."""

from __future__ import annotations

import torch

# Entries of the Q x Q matrices of chunks that are computed together: on a CPU 1 MiB, which its caches hold, elsewhere
# 8 MiB, which fills the cores.
_CPU_ENTRIES = 256 * 1024
_DEVICE_ENTRIES = 2 * 1024 * 1024


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


def pieces(length: int, chunk_size: int, matrices: int, device: torch.device) -> list[tuple[int, int, int]]:
    """(start, chunks, tokens a chunk) that cover `length`: as many chunks, of `matrices` Q x Q matrices each, as are
    computed together; the last, shorter chunk comes alone."""
    entries = _CPU_ENTRIES if device.type == "cpu" else _DEVICE_ENTRIES
    most = max(1, entries // (matrices * chunk_size * chunk_size))
    whole = length // chunk_size
    found = [(first * chunk_size, min(most, whole - first), chunk_size) for first in range(0, whole, most)]
    rest = length - whole * chunk_size
    return [*found, (whole * chunk_size, 1, rest)] if rest else found
