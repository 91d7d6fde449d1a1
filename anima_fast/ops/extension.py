"""Tensors as the C++ side takes them (csrc/common/scans.h): None, or address, element type and strides."""

from __future__ import annotations

import torch

__all__ = ["View", "address", "view"]

View = tuple[int, int, tuple[int, ...]] | None

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def view(x: torch.Tensor | None) -> View:
    """A float tensor; None where it was not given."""
    return None if x is None else (x.data_ptr(), _DTYPES[x.dtype], x.stride())


def address(x: torch.Tensor | None) -> int:
    """A contiguous tensor of integers or bytes; 0 where it was not given."""
    return 0 if x is None else x.data_ptr()
