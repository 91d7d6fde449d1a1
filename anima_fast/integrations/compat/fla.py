"""flash-linear-attention's gated delta rule, served by anima_fast on any device, for inference.

    from anima_fast.integrations.compat.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    o, state = chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    o, state = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=state, output_final_state=True)

Names, parameters and results are those of fla 0.5.2 (fla-org/flash-linear-attention bc3b101). What differs: gradients
are refused; so are `cp_context` (several devices), `gk` and `gv` (decay a channel), `head_first` (gone upstream too)
and unknown keywords, which the original ignores. `cu_seqlens_cpu` and `chunk_indices` only save the original work:
taken, not used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...errors import invalid
from ...gated_delta import gated_delta_rule, gated_delta_step

__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: object | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`anima_fast.gated_delta_rule`, with fla's variants of gate, beta and state layout.

    Args:
        q, k, v, g, beta, scale, cu_seqlens: as in `gated_delta_rule`.
        initial_state: `[sequences, HV, K, V]`, or `[sequences, HV, V, K]` with state_v_first; the final state alike.
        use_beta_sigmoid_in_kernel: beta is a logit: sigmoid(beta), doubled with allow_neg_eigval.
        kwargs: `use_gate_in_kernel` (g is then raw: -exp(A_log) · softplus(g + dt_bias)) with `A_log` and `dt_bias`
            `[HV]`; `chunk_size` 16, 32 or 64; `transpose_state_layout`, the old name of state_v_first.

    Example:
        >>> q = k = torch.randn(1, 10, 2, 16); v = torch.randn(1, 10, 4, 32)
        >>> g = -torch.rand(1, 10, 4); beta = torch.rand(1, 10, 4)
        >>> chunk_gated_delta_rule(q, k, v, g, beta)[0].shape
        torch.Size([1, 10, 4, 32])
    """
    if cp_context is not None:
        raise invalid("cp_context", f"a {type(cp_context).__name__}", "None: one sequence on one device")
    chunk_size = kwargs.pop("chunk_size", 64)
    if chunk_size not in (16, 32, 64):
        raise invalid("chunk_size", chunk_size, "16 | 32 | 64")
    use_gate_in_kernel = kwargs.pop("use_gate_in_kernel", False)
    A_log, dt_bias = kwargs.pop("A_log", None), kwargs.pop("dt_bias", None)
    state_v_first = _state_layout(state_v_first, kwargs)
    o, final_state = gated_delta_rule(
        q,
        k,
        v,
        _decay(g, use_gate_in_kernel, A_log, dt_bias),
        _beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        scale,
        _turn(initial_state, state_v_first),
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        chunk_size,
    )
    return o, _turn(final_state, state_v_first)


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`anima_fast.gated_delta_step`: token by token, any number of tokens. Arguments as in `chunk_gated_delta_rule`.

    g None is no decay, beta None is 1.
    """
    for name, gate in (("gk", gk), ("gv", gv)):
        if gate is not None:
            raise invalid(name, f"shape {list(gate.shape)}", "None: one decay a head and token, g")
    state_v_first = _state_layout(state_v_first, kwargs)
    if g is None and not use_gate_in_kernel:
        g = v.new_zeros(()).expand(v.shape[:3])
    if beta is None:
        beta = v.new_ones(()).expand(v.shape[:3])
    o, final_state = gated_delta_step(
        q,
        k,
        v,
        _decay(g, use_gate_in_kernel, A_log, dt_bias),
        _beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        scale,
        _turn(initial_state, state_v_first),
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
    )
    return o, _turn(final_state, state_v_first)


def _state_layout(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """state_v_first, also under its old name; refuses what is left in kwargs."""
    if "transpose_state_layout" in kwargs:
        if state_v_first:
            raise invalid("transpose_state_layout", "it and state_v_first", "state_v_first, its new name, alone")
        state_v_first = kwargs.pop("transpose_state_layout")
    if "head_first" in kwargs:
        raise invalid("head_first", kwargs["head_first"], "nothing: inputs are [B, T, H, ...]")
    if kwargs:
        raise TypeError(f"{next(iter(kwargs))}: not an argument of fla 0.5.2's gated delta rule")
    return state_v_first


def _decay(
    g: torch.Tensor | None, use_gate_in_kernel: bool, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None
) -> torch.Tensor:
    """g as log decay: given so, or -exp(A_log) · softplus(g + dt_bias) in fp32."""
    if g is None:
        raise invalid("g", "None", "a tensor [B, T, HV]")
    if not use_gate_in_kernel:
        return g
    if A_log is None:
        raise invalid("A_log", "None with use_gate_in_kernel=True", "a tensor [HV]")
    raw = g.float() if dt_bias is None else g.float() + dt_bias.float()
    return -A_log.float().exp() * F.softplus(raw)


def _beta(beta: torch.Tensor, use_sigmoid: bool, allow_neg_eigval: bool) -> torch.Tensor:
    if allow_neg_eigval and not use_sigmoid:
        raise invalid("allow_neg_eigval", "True alone", "True with use_beta_sigmoid_in_kernel=True")
    if not use_sigmoid:
        return beta
    return beta.float().sigmoid() * (2.0 if allow_neg_eigval else 1.0)


def _turn(state: torch.Tensor | None, state_v_first: bool) -> torch.Tensor | None:
    return state.transpose(-1, -2).contiguous() if state is not None and state_v_first else state
