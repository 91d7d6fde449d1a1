"""anima_fast: regional attention and recurrent scans, exact, fast and installable anywhere."""

from .attention import regional_attention
from .bound_plan import BoundPlan
from .dispatch import backends, explain, use_backend
from .errors import NoBackendError
from .plan import RegionPlan

__version__ = "0.1.0"

__all__ = [
    "BoundPlan",
    "NoBackendError",
    "RegionPlan",
    "backends",
    "explain",
    "regional_attention",
    "use_backend",
]
