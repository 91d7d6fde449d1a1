"""The recurrent ops' calls, as the extension takes them on any device (csrc/common/scans.h).

Each function takes the tensors and options of its op's backends and gives the extension's object, which reads and
writes their memory when it is run: they must outlive it.
"""

from __future__ import annotations

from typing import Any

import torch

from .extension import extension

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def view(x: torch.Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """Address, element type and strides of a float tensor; None where it was not given."""
    return None if x is None else (x.data_ptr(), _DTYPES[x.dtype], x.stride())


def address(x: torch.Tensor | None) -> int:
    """A contiguous tensor of integers; 0 where it was not given."""
    return 0 if x is None else x.data_ptr()


def ssd_chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    y: torch.Tensor,
    final_state: torch.Tensor | None,
    varlen_states: torch.Tensor | None,
    *,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Any:
    return extension().SsdChunkScan(
        x=view(x),
        dt=view(dt),
        A=view(A),
        B=view(B),
        C=view(C),
        D=view(D),
        z=view(z),
        dt_bias=view(dt_bias),
        initial_state=view(initial_state),
        y=view(y),
        final_state=view(final_state),
        varlen_states=view(varlen_states),
        seq_idx=address(seq_idx),
        cu_seqlens=address(cu_seqlens if varlen_states is not None else None),
        batch=x.shape[0],
        length=x.shape[1],
        heads=x.shape[2],
        head_dim=x.shape[3],
        groups=B.shape[2],
        state_dim=B.shape[3],
        sequences=0 if varlen_states is None else varlen_states.shape[0],
        dt_min=dt_min,
        dt_max=dt_max,
        dt_softplus=dt_softplus,
    )


def ssd_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    out: torch.Tensor,
    *,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    state_indices: torch.Tensor | None,
) -> Any:
    return extension().SsdStateUpdate(
        state=view(state),
        x=view(x),
        dt=view(dt),
        A=view(A),
        B=view(B),
        C=view(C),
        D=view(D),
        z=view(z),
        dt_bias=view(dt_bias),
        out=view(out),
        state_indices=address(state_indices),
        slots=state.shape[0],
        batch=x.shape[0],
        heads=x.shape[1],
        head_dim=x.shape[2],
        groups=B.shape[1],
        state_dim=B.shape[2],
        dt_softplus=dt_softplus,
    )


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    o: torch.Tensor,
    final_state: torch.Tensor | None,
    *,
    initial_state: torch.Tensor | None,
    scale: float,
    l2norm: bool,
    cu_seqlens: torch.Tensor | None,
) -> Any:
    return extension().GatedDeltaRule(
        q=view(q),
        k=view(k),
        v=view(v),
        g=view(g),
        beta=view(beta),
        initial_state=view(initial_state),
        o=view(o),
        final_state=view(final_state),
        cu_seqlens=address(cu_seqlens),
        batch=q.shape[0],
        length=q.shape[1],
        key_heads=q.shape[2],
        value_heads=v.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        sequences=q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        scale=scale,
        l2norm=l2norm,
    )


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    final_states: torch.Tensor | None,
    *,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    silu: bool,
) -> Any:
    return extension().CausalConv1d(
        x=view(x),
        weight=view(weight),
        bias=view(bias),
        initial_states=view(initial_states),
        out=view(out),
        final_states=view(final_states),
        seq_idx=address(seq_idx),
        batch=x.shape[0],
        channels=x.shape[1],
        length=x.shape[2],
        width=weight.shape[1],
        silu=silu,
    )


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    silu: bool,
    cache_seqlens: torch.Tensor | None,
    state_indices: torch.Tensor | None,
) -> Any:
    return extension().CausalConv1dUpdate(
        x=view(x),
        conv_state=view(conv_state),
        weight=view(weight),
        bias=view(bias),
        out=view(out),
        cache_seqlens=address(cache_seqlens),
        state_indices=address(state_indices),
        slots=conv_state.shape[0],
        batch=x.shape[0],
        channels=x.shape[1],
        length=x.shape[2],
        width=weight.shape[1],
        state_length=conv_state.shape[2],
        silu=silu,
    )
