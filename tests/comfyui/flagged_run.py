"""`python flagged_run.py CHECKOUT OUT FLAG`: stock, Accelerate and Regions under a flag of ComfyUI's."""

from __future__ import annotations

import sys

checkout, out, flag = sys.argv[1:]
sys.path.insert(0, checkout)
sys.argv = ["main.py", "--cpu", flag]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ldm.modules.attention  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import tiny_anima  # noqa: E402
import torch  # noqa: E402
from sampling import regions, sample  # noqa: E402

import anima_fast.integrations.comfyui as fast  # noqa: E402

model = comfy.sd.load_diffusion_model_state_dict(tiny_anima.state_dict())
models = {
    "stock": model,
    "accelerate": fast.accelerate(model),
    "regions": fast.apply_regions(model, regions(fast)),
}
pictures = {name: sample(comfy, patched) for name, patched in models.items()}
torch.save({"backend": comfy.ldm.modules.attention.optimized_attention.__name__, **pictures}, out)
