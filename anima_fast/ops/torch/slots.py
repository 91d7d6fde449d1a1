"""States of decoding, kept in slots: a batch's slots are read and written without a look at the indices' values."""

from __future__ import annotations

import torch


def read_slots(state: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the slot of each row, whether the row has one); rows without read slot 0."""
    valid = (indices >= 0) & (indices < state.shape[0])
    return state.index_select(0, torch.where(valid, indices, 0)), valid


def write_slots(state: torch.Tensor, indices: torch.Tensor, valid: torch.Tensor, rows: torch.Tensor) -> None:
    """state[indices[b]] = rows[b] for the valid rows; rows must hold the old slot 0 where not valid.

    Invalid rows write what some valid row writes, to the same place, or if there is none, slot 0 back to itself: a
    selection of the valid ones would have to wait for a GPU.
    """
    row = torch.arange(indices.shape[0], device=indices.device)
    source = torch.where(valid, row, valid.int().argmax())
    state[torch.where(valid, indices, 0)[source].long()] = rows[source]
