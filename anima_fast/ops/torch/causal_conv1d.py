"""Causal convolution in plain torch: W shifted products, summed in fp32, in the memory order of x."""

from __future__ import annotations

import torch


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
) -> None:
    """Write out, and the last W - 1 of (initial_states, x) where asked."""
    length = x.shape[2]
    width = weight.shape[1]
    taps = weight.float()
    total = torch.empty_like(out, dtype=torch.float32)
    total.copy_(x)
    total *= taps[:, -1:]
    if bias is not None:
        total += bias[:, None]
    for back in range(1, width):
        tap = taps[:, width - 1 - back, None]
        past = x[:, :, : max(length - back, 0)]
        if seq_idx is not None:  # selected, not multiplied by 0: another sequence may hold a NaN
            same = seq_idx[:, back:] == seq_idx[:, : past.shape[2]]
            past = torch.where(same[:, None], past, 0)
        total[:, :, back:].addcmul_(past.float(), tap)
        if initial_states is not None:
            count = min(back, length)
            first = width - 1 - back
            total[:, :, :count].addcmul_(initial_states[:, :, first : first + count].float(), tap)
    if silu:
        torch.nn.functional.silu(total, inplace=True)
    out.copy_(total if seq_idx is None else torch.where((seq_idx < 0)[:, None], 0, total))
    if final_states is not None:
        kept = max(width - 1 - length, 0)  # of what was there before x
        if kept:
            final_states[:, :, :kept] = 0 if initial_states is None else initial_states[:, :, width - 1 - kept :]
        final_states[:, :, kept:] = x[:, :, length - (width - 1 - kept) :]
