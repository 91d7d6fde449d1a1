"""ComfyUI loads this repository as a custom node directory through this file; Python users install the package."""

import importlib
import importlib.util
import sys
from pathlib import Path


def _package():
    """`anima_fast` by its own name, whatever this directory is called: its ops can be registered only once, and other
    node packs import it by that name."""
    if "anima_fast" not in sys.modules:
        here = Path(__file__).parent
        # `kernels/` stands beside the package here and inside it when installed.
        places = [str(here / "anima_fast"), str(here)]
        spec = importlib.util.spec_from_file_location(
            "anima_fast", here / "anima_fast" / "__init__.py", submodule_search_locations=places
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["anima_fast"] = module
        spec.loader.exec_module(module)
    return importlib.import_module("anima_fast.integrations.comfyui.nodes")


async def comfy_entrypoint():
    return await _package().comfy_entrypoint()
