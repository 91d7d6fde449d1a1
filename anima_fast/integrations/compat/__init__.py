"""mamba-ssm, fla and causal-conv1d by their own import lines, where they are not installed.

    from anima_fast.integrations import compat
    compat.install()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined      # anima_fast's

A package that is installed is left alone, whole: `install` serves only what Python cannot find. The modules served
hold the functions of `compat.mamba_ssm`, `compat.fla` and `compat.causal_conv1d` and nothing else, so importing
another name (`from mamba_ssm import Mamba2`) fails as usual, and code that takes the package's presence for the whole
of it will too. They are for inference: a call that needs gradients is refused, also from code that would have had a
slow form of its own for that had the package been absent (transformers does).

transformers (5.23) binds such functions when one of its model files is first imported: call `install` before, or use
`anima_fast.integrations.transformers.enable`, which also reaches models that exist already. Its version checks find
no installed distribution and then read `__version__` of the module: the version whose interface is followed, with
`+anima.fast`. Its `is_*_available` also ask for a GPU. Older versions (4.57) import `fla.modules` where they find
`fla`, which fails: name the packages you want, `install("causal_conv1d", "mamba_ssm")`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ...errors import invalid

__all__ = ["install", "uninstall"]

_logger = logging.getLogger(__name__)

VERSIONS = {"mamba_ssm": "2.3.2.post1", "fla": "0.5.2", "causal_conv1d": "1.6.1"}

# What each module holds: names of our module called as its first part.
_MODULES: dict[str, tuple[str, ...]] = {
    "mamba_ssm": (),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.layernorm_gated": ("RMSNorm", "rmsnorm_fn"),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "fla": (),
    "fla.ops": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "fla.ops.gated_delta_rule": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_fn", "causal_conv1d_update"),
}
_PACKAGES = {name.rpartition(".")[0] for name in _MODULES}


class _Compat(MetaPathFinder, Loader):
    """Finds and makes the modules of the packages in `serving`; last on sys.meta_path, so real ones come first."""

    def __init__(self) -> None:
        self.serving: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        if package not in self.serving or fullname not in _MODULES:
            return None
        spec = ModuleSpec(fullname, self, origin=_source(package), is_package=fullname in _PACKAGES)
        spec.has_location = True  # __file__: an ImportError for a name that is not there says where it looked
        return spec

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        source = importlib.import_module(f"{__name__}.{package}")
        for name in _MODULES[module.__name__]:
            setattr(module, name, getattr(source, name))
        if module.__name__ == package:
            module.__version__ = f"{VERSIONS[package]}+anima.fast"  # type: ignore[attr-defined]


_finder = _Compat()


def _source(package: str) -> str:
    spec = importlib.util.find_spec(f"{__name__}.{package}")
    assert spec is not None and spec.origin is not None
    return spec.origin


def install(*packages: str) -> tuple[str, ...]:
    """Makes `import mamba_ssm`, `fla` and `causal_conv1d` (or those named) work where they are absent.

    Logs one line that says for which. Again and again is the same as once.

    Returns:
        The packages now served by anima_fast.

    Raises:
        ValueError: for a package there is no compatibility module for.

    Example:
        >>> compat.install("causal_conv1d")
        ('causal_conv1d',)
        >>> from causal_conv1d import causal_conv1d_fn
    """
    for package in packages:
        if package not in VERSIONS:
            raise invalid("packages", repr(package), " | ".join(VERSIONS))
    new = [p for p in packages or VERSIONS if p not in _finder.serving and importlib.util.find_spec(p) is None]
    if new:
        _finder.serving.update(new)
        if _finder not in sys.meta_path:
            sys.meta_path.append(_finder)
        _logger.warning("anima_fast serves %s, not installed here (the recurrent functions only)", ", ".join(new))
    return tuple(sorted(_finder.serving))


def uninstall() -> None:
    """Takes back `install`: the packages are absent again. Functions already imported stay usable."""
    _finder.serving.clear()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in _MODULES:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if spec is not None and spec.loader is _finder:
            del sys.modules[name]
