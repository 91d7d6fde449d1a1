"""`python -m anima_fast.integrations.comfyui PATH`: lets a ComfyUI use the nodes of an installed anima_fast.

Writes one file, `custom_nodes/anima_fast_nodes.py`. Not needed where this repository itself lies in custom_nodes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_FILE = '''\
"""The nodes of the installed anima_fast. Written by `python -m anima_fast.integrations.comfyui`."""

from anima_fast.integrations.comfyui.nodes import comfy_entrypoint  # noqa: F401
'''


def main(arguments: list[str] | None = None) -> int:
    """0: written, 2: not a ComfyUI."""
    parser = argparse.ArgumentParser(
        prog="python -m anima_fast.integrations.comfyui",
        description="Write custom_nodes/anima_fast_nodes.py, through which ComfyUI finds this installation's nodes.",
        epilog="example: python -m anima_fast.integrations.comfyui ~/ComfyUI",
    )
    parser.add_argument("path", help="the ComfyUI directory (or its --base-directory), which holds custom_nodes")
    path = Path(parser.parse_args(arguments).path).expanduser()
    nodes = path / "custom_nodes"
    if not nodes.is_dir():
        print(f"PATH: got {str(path)!r}; allowed: a ComfyUI directory, which holds custom_nodes", file=sys.stderr)
        return 2
    target = nodes / "anima_fast_nodes.py"
    target.write_text(_FILE, encoding="utf-8")
    print(f"written: {target}. Run ComfyUI with this Python: {sys.executable}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
