"""The numbers that findings are judged by, each with its reason, and the names that tell model families apart.

Anima: a flow model in the latent space of Qwen-Image's VAE (16 channels, 8 pixels a cell), 2 x 2 cells a token, so
16 pixels a token; noise schedule shift 3. Ranges are those of the model's card and official templates; outside them a
picture may still be good, so a value that is only unusual is a note.
"""

from __future__ import annotations

import re

__all__ = ["family"]

SHIFT = 3.0
SHIFT_TOLERANCE = 0.05
PATCH_PIXELS = 16
LATENT_PIXELS = 8

STEPS = (30, 60)
STEPS_LEAST = 20  # below it, the unturned model is visibly unfinished
CFG = (3.5, 5.0)
CFG_LIMITS = (2.5, 7.0)  # beyond it, washed out or burnt

#: A turbo LoRA is trained for 8 steps without guidance; with fewer than 4 it is unfinished, past 16 it overcooks.
TURBO_STEPS, TURBO_BEST_STEPS = (4, 16), 8
TURBO_CFG, TURBO_BEST_CFG = (1.0, 2.0), 1.0
TURBO_NAMES = re.compile(r"turbo|lightning|hyper|distill|rdbt|\blcm|dmd|(?<!\d)[48][-_ ]?steps?(?![a-z])", re.I)

#: First pass, in units of 2**20 pixels. Preview checkpoints were trained around one; later ones see up to 1536².
MEGAPIXELS = {"preview": (0.6, 1.5), "other": (0.25, 2.4)}
MEGAPIXELS_USUAL = (0.75, 1.6)
#: A second pass starts from a picture; so much denoising makes a new one, at a size that the model is weak at.
HIRES_DENOISE = 0.7

SAMPLERS = ("er_sde", "euler", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu")
SCHEDULERS = ("simple", "normal", "sgm_uniform", "beta")
#: Their formulas assume the noise of the older models (variance exploding), not a flow's straight line.
SAMPLERS_NOT_FLOW = ("ddpm",)
SCHEDULERS_NOT_FLOW = {
    "karras": "it spaces the logarithm of sigma, so most steps go where a flow model has nothing left to do",
    "exponential": "it spaces the logarithm of sigma, so most steps go where a flow model has nothing left to do",
    "polyexponential": "it spaces the logarithm of sigma, so most steps go where a flow model has nothing left to do",
}

#: Regional bias. STRICT: e^-4.6 = 1 % is what a prompt keeps outside its mask when regions are as good as hard.
BIAS_EPS = (1e-4, 1e-3)
BIAS_START, BIAS_START_LATE, BIAS_END = (0.15, 0.35), 0.7, 1.0
BIAS_STRENGTH, BIAS_STRENGTH_MOST = (0.2, 0.5), 1.0
BIAS_STRICT, BIAS_EXTREME = -4.6, -9.0

#: The attention override of the hook for the last of these; before, ComfyUI has no Anima at all.
COMFYUI_ANIMA = (0, 11)
COMFYUI_NODES = (0, 29)

#: Not WanAnimate, Animagine (SDXL) or an animation.
_ANIMA = r"anima(?!t|gine|l)"
_ENCODERS = (
    ("anima", _ANIMA + r"|qwen[-_]?3[-_.]*0?[._]?6b|qwen_?3_?0?6"),
    ("Qwen3.5, which needs a loader of its own", r"qwen[-_]?3[._]?5"),
    ("Qwen2.5-VL (Qwen-Image)", r"qwen[-_]?2[._]?5"),
    ("a larger Qwen3 (other models)", r"qwen[-_]?3.*(?<!\d)(1[._]7|4|8|14|32)b"),
    ("UMT5 (Wan)", r"umt5"),
    ("T5-XXL (Flux, SD3)", r"t5[-_]?(xxl|v1|base)|t5xxl"),
    ("CLIP-L", r"clip[-_]?l(?![a-z])|vit-?l"),
    ("CLIP-G (SDXL)", r"clip[-_]?g(?![a-z])|bigg"),
    ("Llama", r"llama"),
    ("Gemma", r"gemma"),
    ("ByT5", r"byt5"),
    ("Mistral", r"mistral|ministral"),
)
_VAES = (
    ("anima", _ANIMA + r"|qwen[-_]?image"),
    ("wan2.1", r"wan[-_]?2?[._]?1[-_. ]?vae|wan_?21|wan_2\.1"),
    ("Wan 2.2, 48 channels", r"wan[-_]?2[._]?2"),
    ("Flux, 16 channels of another meaning", r"^ae\.|^ae$|flux"),
    ("SDXL, 4 channels", r"sdxl|xl[-_]?vae|illustrious|noob|pony"),
    ("SD 1.5, 4 channels", r"vae-ft|840000|kl-f8|sd[-_]?1|anything"),
    ("SD3", r"sd3"),
    ("Hunyuan", r"hunyuan"),
    ("LTX", r"ltx"),
    ("an approximation for previews", r"^tae"),
)
_MODELS = (
    ("anima", _ANIMA),
    ("Cosmos-Predict2 without Anima's text adapter", r"cosmos"),
    ("Qwen-Image", r"qwen[-_]?image"),
    ("SDXL", r"sd[-_]?xl|illustrious|pony|noob"),
    ("SD 1.5", r"sd[-_]?v?1[-_.]?[45]|v1-5"),
    ("SD3", r"sd[-_]?3"),
    ("Flux", r"flux"),
    ("Wan", r"(?<![a-z])wan[-_]?2"),
    ("Hunyuan", r"hunyuan"),
    ("Z-Image", r"z[-_]?image"),
    ("Lumina", r"lumina"),
    ("AuraFlow", r"aura[-_]?flow"),
    ("Chroma", r"chroma"),
)
_TABLES = {"encoder": _ENCODERS, "vae": _VAES, "model": _MODELS}


def family(kind: str, name: str) -> str | None:
    """What a file's name says it is, "anima" first; None if it says nothing. `kind`: encoder, vae or model."""
    base = re.split(r"[\\/]", name)[-1].lower()
    return next((label for label, pattern in _TABLES[kind] if re.search(pattern, base)), None)
