"""The hybrid text encoder for Anima (Qwen3.5-4B): load it, encode prompts, align and calibrate what comes out.

    encoder = anima_fast.encoder.load("qwen35_4b.safetensors")
    states, mask = encoder.encode(["a red cat", "the sea"])       # [B, L, 1024], [B, L]

head -> alignment -> calibration -> output_scale; the last three are off until asked for. docs/encoder.md is the guide.
"""

from .adjust import Adjustment
from .alignment import Alignment
from .calibration import Calibration
from .encoder import Encoder, load
from .head import ExpRMSNorm

__all__ = ["Adjustment", "Alignment", "Calibration", "Encoder", "ExpRMSNorm", "load"]
