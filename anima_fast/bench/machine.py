"""What a measurement was made on: versions, processor, devices, commit. No names of hosts or users."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..ops.extension import build_info, extension, unavailable

__all__ = ["commit", "describe"]


def describe() -> dict[str, Any]:
    """The machine and the software as plain data."""
    missing = unavailable()
    capabilities = {} if missing else extension().capabilities()
    return {
        "anima_fast": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _version("triton") or _version("triton-windows"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "extension": {
            "usable": missing is None,
            "reason": missing,
            "isa": capabilities.get("isa"),
            "isas": capabilities.get("isas", []),
            "openmp": capabilities.get("openmp"),
            "compiler": build_info().get("compiler"),
            "cuda": build_info().get("cuda"),
        },
        "cuda": torch.version.cuda,
        "devices": [
            {
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory_bytes": p.total_memory,
            }
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
    }


def commit() -> str | None:
    """The commit of the source tree this package runs from, with "-dirty" after edits; None if installed."""
    here = Path(__file__).parent
    try:  # tracked, so that a package inside some other repository's .venv does not take that one's commit
        _git(here, "ls-files", "--error-unmatch", str(here.parent / "__init__.py"))
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", where, *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
