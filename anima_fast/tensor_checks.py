"""Checks of the tensors that the recurrent ops take. Each error names the argument, what came and what is allowed.

What shapes, types and devices tell is checked in the public functions, also while torch.compile traces them. What only
the data tells (the order of cu_seqlens, a non-finite A) is checked where an op runs, and only on the CPU: reading a
GPU's memory would make the call wait for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .errors import invalid, wrong_type

__all__ = [
    "check_batch_of_sequences",
    "check_chunk_size",
    "check_cu_seqlens",
    "check_divides",
    "check_finite",
    "check_first",
    "check_flag",
    "check_index",
    "check_no_gradients",
    "check_size",
    "check_tensor",
    "check_writable",
    "float_like",
    "precision_of",
    "unit_last",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
LARGEST = 256  # of every head, state, key and value dimension


def check_first(name: str, x: Any, axes: str, dims: int) -> None:
    """The tensor that says the type, the device and the sizes of the call."""
    if not isinstance(x, torch.Tensor):
        raise wrong_type(name, x, "a tensor")
    if x.ndim != dims:
        raise invalid(name, f"shape {list(x.shape)}", axes)
    if x.dtype not in FLOATS:
        raise invalid(name, f"{x.dtype}", "float32, float16 or bfloat16 (float64 in backend 'reference')")


def check_tensor(
    name: str, x: Any, axes: str, shape: tuple[int, ...], first: torch.Tensor, *, own_type: bool = False
) -> None:
    """A tensor of `shape`, on the device of `first` and of its type, or with own_type of any float type."""
    if not isinstance(x, torch.Tensor):
        raise wrong_type(name, x, f"a tensor {axes}")
    if x.shape != shape:
        raise invalid(name, f"shape {list(x.shape)}", f"{axes} = {list(shape)}")
    if x.device != first.device:
        raise invalid(name, f"device {x.device}", f"{first.device}, as the first argument")
    if x.dtype != first.dtype and not (own_type and x.dtype in FLOATS):
        raise invalid(name, f"{x.dtype}", "a float type" if own_type else f"{first.dtype}, as the first argument")


def check_index(name: str, x: Any, axes: str, shape: tuple[int, ...], first: torch.Tensor) -> None:
    """A tensor of whole numbers."""
    if not isinstance(x, torch.Tensor):
        raise wrong_type(name, x, f"a tensor {axes}")
    if x.dtype not in INTEGERS:
        raise invalid(name, f"{x.dtype}", "int32 or int64")
    if x.shape != shape:
        raise invalid(name, f"shape {list(x.shape)}", f"{axes} = {list(shape)}")
    if x.device != first.device:
        raise invalid(name, f"device {x.device}", f"{first.device}, as the first argument")


def check_batch_of_sequences(cu_seqlens: Any, first: torch.Tensor) -> None:
    """cu_seqlens [sequences + 1]: where the sequences in the one row of `first` begin and end."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise wrong_type("cu_seqlens", cu_seqlens, "a tensor [sequences + 1]")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise invalid("cu_seqlens", f"shape {list(cu_seqlens.shape)}", "[sequences + 1]")
    check_index("cu_seqlens", cu_seqlens, "[sequences + 1]", (cu_seqlens.shape[0],), first)
    if first.shape[0] != 1:
        raise invalid("cu_seqlens", f"a batch of {first.shape[0]}", "a batch of 1 that holds all sequences")


def check_size(name: str, what: str, size: int, low: int = 1, high: int = LARGEST) -> None:
    if not low <= size <= high:
        raise invalid(name, f"{what} = {size}", f"{what} from {low} to {high}")


def check_divides(name: str, what: str, part: int, whole: int, of: str) -> None:
    if part < 1 or whole % part:
        raise invalid(name, f"{part} {what} for {whole} {of}", f"a divisor of the number of {of}")


def check_chunk_size(chunk_size: Any) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, torch.SymInt)):
        raise wrong_type("chunk_size", chunk_size, "a whole number >= 1")
    if chunk_size < 1:
        raise invalid("chunk_size", f"{chunk_size}", "a whole number >= 1")


def check_flag(name: str, value: Any) -> None:
    if value is not True and value is not False:
        raise wrong_type(name, value, "True or False")


def check_writable(name: str, x: torch.Tensor) -> None:
    """Refuse an expanded tensor where results are written: several elements would share one address."""
    strides = x.stride()
    if 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, x.shape, strict=True)):
        raise invalid(name, f"an expanded tensor, strides {list(strides)}", "a tensor with memory of its own")


def check_no_gradients(*tensors: torch.Tensor | None) -> None:
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                raise invalid("gradients", "a tensor that requires them", "inference: call under torch.no_grad()")


def check_cu_seqlens(cu_seqlens: torch.Tensor, length: int) -> None:
    """From 0 to `length` and never down; not looked at on a GPU."""
    if cu_seqlens.device.type == "cpu":
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != length or values != sorted(values):
            raise invalid("cu_seqlens", f"{values}", f"increasing from 0 to the length, {length}")


def check_finite(name: str, x: torch.Tensor) -> None:
    """No NaN and no infinity; not looked at on a GPU. The sum carries either of them."""
    if x.device.type == "cpu" and not math.isfinite(x.sum(dtype=torch.float64).item()):
        raise invalid(name, "values that are not finite", "finite numbers")


def precision_of(first: torch.Tensor) -> torch.dtype:
    """The type of decays and states: fp32, or fp64 for fp64 inputs (backend "reference")."""
    return torch.float64 if first.dtype == torch.float64 else torch.float32


def float_like(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """x, an argument with a type of its own, in one of the types that backends know."""
    return x.float() if x.dtype == torch.float64 and first.dtype != torch.float64 else x


def unit_last(x: torch.Tensor) -> torch.Tensor:
    """x with a unit last stride; copied only if it has another."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
