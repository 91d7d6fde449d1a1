"""transformers' recurrent models on anima_fast: Mamba2 and gated-delta-rule families, new models and existing ones.

    from anima_fast.integrations import transformers as routing
    routing.enable()                           # or for a while: with routing.enable(): ...
    model.generate(**inputs)                   # prefill, cached decoding, padding, packed sequences

How it works (transformers 5.17 to 5.23, with or without its `kernels` package): each model file holds its kernels as
module-level functions that its layers look up when they run. `enable` replaces those functions; `disable` puts the
very same objects back. Nothing in a model changes, so it does not matter whether the model was made before or after.
Where layers do not look their functions up like that (4.57 chooses them in `__init__`), the family is left alone and
a warning names it. Calls that need gradients (training) keep transformers' own functions.

Packed sequences: `seq_idx` for Mamba2 models; `cu_seq_lens_q` (transformers' name for cu_seqlens), batch 1, for all.
Without kernel packages transformers 5.23 refuses them and 5.17 mixes them. Attention layers must be told too, by
`position_ids` that start again, and granitemoehybrid's listen only under flash attention; Mamba2ForCausalLM keeps
such arguments to itself, call its `.backbone`.
"""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch

from ..errors import invalid
from .compat import causal_conv1d, fla, mamba_ssm

__all__ = ["FAMILIES", "Routing", "disable", "enable"]

Function = Callable[..., Any]


def _unfused(*args: Any, **kwargs: Any) -> None:
    """For `mamba2_split_conv1d_scan_combined`: None makes the layer run its parts, which are routed one by one.

    The fused form cannot zero padding tokens between convolution and scan, as the layer otherwise does.
    """


_CONV: dict[str, Function] = {
    "causal_conv1d_fn": causal_conv1d.causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d.causal_conv1d_update,
}
_MAMBA2: dict[str, Function] = {
    **_CONV,
    "mamba2_chunk_scan": mamba_ssm.mamba_chunk_scan_combined,
    "mamba2_selective_state_update": mamba_ssm.selective_state_update,
    "mamba2_split_conv1d_scan_combined": _unfused,
}
_DELTA_RULE: dict[str, Function] = {
    **_CONV,
    "torch_chunk_gated_delta_rule": fla.chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": fla.fused_recurrent_gated_delta_rule,
}
# transformers' model name -> the functions in its model file that are routed
FAMILIES: dict[str, dict[str, Function]] = {
    **dict.fromkeys(("mamba2", "bamba", "zamba2", "nemotron_h", "granitemoehybrid", "falcon_h1"), _MAMBA2),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), _DELTA_RULE),
}

_originals: dict[tuple[ModuleType, str], Function] = {}
_routed: list[str] = []


class Routing:
    """What `enable` returns: the families it routes; as a context manager, ends what that call began."""

    def __init__(self, families: tuple[str, ...], began: bool) -> None:
        self.families = families
        self._began = began

    def __enter__(self) -> Routing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._began:
            disable()

    def __repr__(self) -> str:
        return f"Routing(families={self.families})"


def enable() -> Routing:
    """Routes transformers' Mamba2 and gated-delta-rule models through anima_fast until `disable`.

    Returns:
        A `Routing`: `.families` are the models routed; `with enable():` routes for the block only. Called while
        already on, it changes nothing.

    Raises:
        ModuleNotFoundError: transformers is not installed.

    Warns:
        UserWarning: once a call, naming the models of this transformers version that it cannot route.

    Example:
        >>> with enable() as routing:
        ...     output = model(input_ids)
        >>> routing.families
        ('mamba2', 'bamba', 'zamba2', 'nemotron_h', 'granitemoehybrid', 'falcon_h1', 'qwen3_next', ...)
    """
    if _originals:
        return Routing(tuple(_routed), began=False)
    version = importlib.import_module("transformers").__version__
    modules = {
        family: importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for family in FAMILIES
        if importlib.util.find_spec(f"transformers.models.{family}")  # else this version has no such model
    }
    without_hook = [f for f, module in modules.items() if not FAMILIES[f].keys() <= _looked_up_by_layers(module)]
    for family, module in modules.items():
        if family in without_hook:
            continue
        _routed.append(family)
        for name, ours in FAMILIES[family].items():
            _originals[module, name] = getattr(module, name)
            setattr(module, name, _route(_originals[module, name], ours))
    if without_hook:
        warnings.warn(
            f"anima_fast does not route {', '.join(without_hook)}: in transformers {version} the layers of these "
            f"models do not look up their functions where anima_fast could replace them",
            stacklevel=2,
        )
    return Routing(tuple(_routed), began=True)


def disable() -> None:
    """Puts back every function that `enable` replaced. Without `enable` it does nothing.

    Example:
        >>> disable()
    """
    for (module, name), original in _originals.items():
        setattr(module, name, original)
    _originals.clear()
    _routed.clear()


def _looked_up_by_layers(module: ModuleType) -> set[str]:
    """The module-level names that the `forward` methods of the module's classes look up when called."""
    names = set()
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__ and "forward" in vars(cls):
            code = getattr(inspect.unwrap(vars(cls)["forward"]), "__code__", None)
            if code is not None:
                names |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names


def _route(original: Function, ours: Function) -> Function:
    """A function for `original`'s place: ours, or the original where a gradient is needed."""
    parameters = inspect.signature(ours).parameters
    accepted = frozenset(name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD)

    @functools.wraps(original, updated=())  # with the `kernels` package, original is a module object
    def routed(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in (*args, *kwargs.values())
        ):
            return original(*args, **kwargs)
        # Layers pass on every keyword they were called with, as they do to the original packages.
        cu_seqlens, seq_idx = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
        kwargs = {name: value for name, value in kwargs.items() if name in accepted}
        if "seq_idx" in accepted:
            if seq_idx is None and cu_seqlens is not None:
                # x is [B, D, L] for the convolution, [B, L, H, P] for the scan
                kwargs["seq_idx"] = _seq_idx(cu_seqlens, args[0].shape[2 if args[0].ndim == 3 else 1])
        elif seq_idx is not None and kwargs.get("cu_seqlens", seq_idx) is None:
            raise invalid("cu_seq_lens_q", "None with seq_idx", "both: the delta rule goes by the sequences' bounds")
        return ours(*args, **kwargs)

    return routed


def _seq_idx(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """`[1, length]`: the sequence of each token, from `[sequences + 1]` bounds; without a host sync.

    The bounds count from the right: with a cache, the convolution's input begins with tokens from before this call.
    """
    token = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype) - length + cu_seqlens[-1]
    return torch.bucketize(token, cu_seqlens[1:], right=True).to(torch.int32)[None]
