"""The error rule of every op, stated once: tests and benchmarks hold results to it.

    max|out - oracle64| <= 2 · max|reference - oracle64| + 2 · eps · max|oracle64| + eps · max|score| · max|v|

oracle64 is the op in fp64 on the same inputs, reference the plain implementation in the inputs' own type, eps that
type's machine epsilon. The last term is for attention only: a score of size s is known to eps · s, which moves
weights by that share; torch's own scaled_dot_product_attention needs it.
"""

from __future__ import annotations

import torch

__all__ = ["error_bound"]


def error_bound(
    oracle: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, *, score: float = 0.0, value: float = 0.0
) -> float:
    """The largest allowed |out - oracle|; `score` and `value` are max|score| and max|v| of an attention."""
    if oracle.numel() == 0:
        return 0.0
    eps = torch.finfo(dtype).eps
    lost = float((reference.double() - oracle).abs().max())
    return 2 * lost + 2 * eps * float(oracle.abs().max()) + eps * score * value
