"""anima_fast: regional attention and recurrent scans, exact, fast and installable anywhere."""

from .attention import regional_attention
from .bound_plan import BoundPlan
from .conv import causal_conv1d, causal_conv1d_update
from .dispatch import backends, explain, use_backend
from .errors import NoBackendError
from .gated_delta import gated_delta_rule, gated_delta_step
from .plan import RegionPlan
from .ssd import ssd_chunk_scan, ssd_state_update

__version__ = "0.1.0"

__all__ = [
    "BoundPlan",
    "NoBackendError",
    "RegionPlan",
    "backends",
    "causal_conv1d",
    "causal_conv1d_update",
    "explain",
    "gated_delta_rule",
    "gated_delta_step",
    "regional_attention",
    "ssd_chunk_scan",
    "ssd_state_update",
    "use_backend",
]
