"""A real ComfyUI on the CPU, imported from the checkout that ANIMA_FAST_COMFYUI names."""

from __future__ import annotations

import os
import sys
import types
import warnings
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("ANIMA_FAST_COMFYUI")
SENTENCE = "needs a real ComfyUI: set ANIMA_FAST_COMFYUI to a checkout whose requirements are installed"


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            if not CHECKOUT:
                item.add_marker(pytest.mark.skip(reason=SENTENCE))
            # What ComfyUI and its dependencies warn of is not ours.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def comfy():
    """The ComfyUI modules that the tests use."""
    sys.path.insert(0, str(Path(CHECKOUT).resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from comfy.cli_args import args

        args.cpu = True  # before model_management looks for a GPU
        import comfy.ldm.modules.attention
        import comfy.sample
        import comfy.samplers
        import comfy.sd
        import comfy.utils
        import nodes
    return types.SimpleNamespace(
        attention=comfy.ldm.modules.attention,
        sample=comfy.sample,
        samplers=comfy.samplers,
        sd=comfy.sd,
        utils=comfy.utils,
        nodes=nodes,
    )


@pytest.fixture(scope="session")
def model(comfy):
    import tiny_anima

    return comfy.sd.load_diffusion_model_state_dict(tiny_anima.state_dict())


@pytest.fixture(scope="session")
def fast(comfy):
    import anima_fast.integrations.comfyui as fast

    return fast
