"""`python compiled_run.py CHECKOUT`: pictures of a model under core's TorchCompileModel equal those without it.

The node drops the guards on the options, through which plans, windows and blocks are reached: what was traced for one
of these cases must not serve another. Tracing is what could go wrong, so the graphs run as they are ("eager").
"""

from __future__ import annotations

import logging
import sys

sys.path.insert(0, sys.argv[1])
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import tiny_anima  # noqa: E402
from comfy_extras.nodes_torch_compile import TorchCompileModel  # noqa: E402
from sampling import assert_close, regions, sample  # noqa: E402

import anima_fast.integrations.comfyui as fast  # noqa: E402

logging.getLogger().setLevel(logging.INFO)


def compiled(model):
    return TorchCompileModel.execute(model, "eager").args[0]


model = comfy.sd.load_diffusion_model_state_dict(tiny_anima.state_dict())
model.model.diffusion_model.blocks = model.model.diffusion_model.blocks[:2]
for case in ({"blocks": frozenset({1}), "outside": "base"}, {"start_percent": 0.3, "end_percent": 0.75}):
    settings, chosen = fast.Settings(strength=1.0, **case), regions(fast)
    ours = fast.apply_regions(model, chosen, settings)
    expected = sample(comfy, ours, steps=4)
    assert_close(sample(comfy, compiled(ours), steps=4), expected)
    assert_close(sample(comfy, fast.apply_regions(compiled(model), chosen, settings), steps=4), expected)
longer = tiny_anima.conditioning(33, 77)
assert_close(sample(comfy, compiled(ours), positive=longer), sample(comfy, ours, positive=longer))
assert_close(sample(comfy, compiled(fast.accelerate(model))), sample(comfy, model))
