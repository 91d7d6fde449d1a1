"""anima_fast in ComfyUI, and for authors of other node packs. Importing this imports no part of ComfyUI.

`apply_regions`, `accelerate`       what the nodes do, for a script
`concatenate`, `masks_to_token_grid`, `build_bias`, `apply_plan`      regional conditioning in four steps
`regional_override`, `couple_attention`, `accelerate_bias_override`   for a pack's own attention: docs/node-packs.md
"""

from .override import accelerate_bias_override, couple_attention, regional_override
from .patching import accelerate, apply_plan, apply_regions
from .regions import Region, Settings
from .steps import Ranges, build_bias, concatenate, masks_to_token_grid

__all__ = [
    "Ranges",
    "Region",
    "Settings",
    "accelerate",
    "accelerate_bias_override",
    "apply_plan",
    "apply_regions",
    "build_bias",
    "concatenate",
    "couple_attention",
    "masks_to_token_grid",
    "regional_override",
]
