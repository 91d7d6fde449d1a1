"""`anima_fast._C`, the compiled part: there or not, and how it was built."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

__all__ = ["build_info", "extension", "unavailable"]


@functools.cache
def extension() -> ModuleType:
    """`anima_fast._C`. torch is imported first, so that both share one OpenMP runtime."""
    importlib.import_module("torch")
    return importlib.import_module("anima_fast._C")


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
