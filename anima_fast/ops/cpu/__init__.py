"""Ops in C++ (csrc/cpu), through `anima_fast._C`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


@functools.cache
def extension() -> ModuleType:
    """`anima_fast._C`. torch is imported first, so that both share one OpenMP runtime."""
    importlib.import_module("torch")
    return importlib.import_module("anima_fast._C")


@contextlib.contextmanager
def workspace(size: int) -> Iterator[int]:
    """The address, a multiple of 64, of `size` bytes that live as long as the context. From torch: reused, profiled."""
    import torch

    block = torch.empty(size + 64, dtype=torch.uint8)
    yield -(-block.data_ptr() // 64) * 64


@functools.cache
def unavailable() -> str | None:
    """Why the extension is not there, or None."""
    try:
        extension()
    except ModuleNotFoundError:
        reason = build_info().get("reason") or "it was not built"
        return f"the C++ extension is not installed ({reason}); install a C++17 compiler and reinstall anima-fast"
    except ImportError as error:
        return f"the C++ extension does not load ({error}); reinstall anima-fast"
    return None


def build_info() -> dict[str, object]:
    """What setup.py recorded when the package was built; empty if it did not."""
    path = Path(__file__).parents[2] / "_build.json"
    try:
        info = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return info if isinstance(info, dict) else {}
