"""mamba-ssm's Mamba2 functions, served by anima_fast on any device, for inference.

    from anima_fast.integrations.compat.mamba_ssm import mamba_chunk_scan_combined, selective_state_update
    y, state = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D, return_final_states=True)
    y = selective_state_update(state, x[:, 0], dt_step, A_step, B[:, 0], C[:, 0])     # state is updated in place

Names, parameters and results are those of mamba-ssm 2.3.2.post1 (state-spaces/mamba e9594ce). What differs: gradients
are refused; D may also be per token, `(B, L, H)`; states are kept in fp32 whatever `state_dtype` says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...conv import causal_conv1d
from ...errors import invalid
from ...ssd import ssd_chunk_scan, ssd_state_update

__all__ = [
    "RMSNorm",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_state_update",
]

_NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`anima_fast.ssd_chunk_scan`. As in mamba-ssm, cu_seqlens counts only with return_varlen_states."""
    return ssd_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens if return_varlen_states else None,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
        return_varlen_states=return_varlen_states,
        state_dtype=state_dtype,
    )


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """`anima_fast.ssd_state_update`: one token, `state` updated in place."""
    return ssd_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A Mamba2 layer from behind its input projection: convolution, scan, gated RMSNorm, output projection.

    Args:
        zxbcdt: `[B, L, 2 F + 2 H P + 2 G N + H]`: F pairs of a feed-forward SwiGLU beside the scan (none in most
            models), z, then x, B and C before the convolution, then dt. F follows from the width.
        conv1d_weight: `[H P + 2 G N, W]`. conv1d_bias: `[H P + 2 G N]` or None.
        dt_bias, A: `[H]`. D: `[H]` (headdim must then be given) or `[H, P]`.
        initial_states: `[B, H, P, N]`. seq_idx: `[B, L]`, which sequence of a packed row each token belongs to.
        rmsnorm_weight: `[H P]`, for a norm over each of the G groups; None: no norm, y · silu(z) alone.
        norm_before_gate: RMSNorm(y) · silu(z), or else RMSNorm(y · silu(z)).
        outproj_weight: `[O, F + H P]`, outproj_bias: `[O]`.

    Returns:
        `[B, L, O]`, or without outproj_weight `[B, L, F + H P]`; with return_final_states also `[B, H, P, N]`, fp32.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Example:
        >>> H, P, N = 4, 16, 8; inner = H * P
        >>> zxbcdt = torch.randn(1, 10, 2 * inner + 2 * N + H)
        >>> weight, dt_bias, A, D = torch.randn(inner + 2 * N, 4), torch.randn(H), -torch.rand(H), torch.ones(H)
        >>> mamba_split_conv1d_scan_combined(zxbcdt, weight, None, dt_bias, A, D, 64, headdim=P).shape
        torch.Size([1, 10, 64])
    """
    if D.ndim == 2:
        heads, headdim = D.shape
    elif headdim is None:
        raise invalid("headdim", "None with D of one dimension", "a number, or D of shape (heads, headdim)")
    else:
        heads = D.shape[0]
    inner = heads * headdim
    conv_dim = conv1d_weight.shape[0]
    state_dim, rest = divmod(conv_dim - inner, 2 * ngroups)
    if state_dim < 1 or rest:
        allowed = f"{inner} + 2 * {ngroups} * N rows, by D, headdim and ngroups"
        raise invalid("conv1d_weight", f"shape {list(conv1d_weight.shape)}", allowed)
    feed_forward, rest = divmod(zxbcdt.shape[-1] - inner - conv_dim - heads, 2)
    if feed_forward < 0 or rest:
        allowed = f"{inner + conv_dim + heads} (z, xBC, dt) plus an even number"
        raise invalid("zxbcdt", f"width {zxbcdt.shape[-1]}", allowed)
    if outproj_bias is not None and outproj_weight is None:
        raise invalid("outproj_bias", "a bias without outproj_weight", "None")

    ff, z, xBC, dt = zxbcdt.split([2 * feed_forward, inner, conv_dim, heads], dim=-1)
    conv = causal_conv1d(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    assert isinstance(conv, torch.Tensor)
    x, B, C = conv.transpose(1, 2).split([inner, ngroups * state_dim, ngroups * state_dim], dim=-1)
    y, final_states = ssd_chunk_scan(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, state_dim)),
        C.unflatten(-1, (ngroups, state_dim)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
    )
    out = y.flatten(2)
    if rmsnorm_weight is not None:
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if feed_forward:
        gate, up = ff.float().chunk(2, dim=-1)
        out = torch.cat([(F.silu(gate) * up).to(out.dtype), out], dim=-1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, final_states) if return_final_states else out


def rmsnorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight + bias over each group of the last dimension, gated by silu(z); in fp32.

    group_size: how many neighbouring channels share a mean; default all. norm_before_gate: gate the result, or else
    gate x. In plain torch, so gradients work.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(kind)
    gate = None if z is None else F.silu(z.to(kind))
    if gate is not None and not norm_before_gate:
        wide = wide * gate
    groups = wide.unflatten(-1, (-1, group_size or x.shape[-1]))
    normed = groups * torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + eps)
    out = normed.flatten(-2) * weight.to(kind)
    if bias is not None:
        out = out + bias.to(kind)
    if gate is not None and norm_before_gate:
        out = out * gate
    return out.to(x.dtype)


class RMSNorm(torch.nn.Module):
    """`rmsnorm_fn` with its weight; parameters and state dict as mamba_ssm.ops.triton.layernorm_gated.RMSNorm."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
