"""What follows the head: alignment, then calibration, then a factor. Everything is off by default."""

from __future__ import annotations

import dataclasses
import functools
import math
import os

import torch

from ..errors import invalid
from .alignment import Alignment, check_strength
from .calibration import Calibration, affine
from .files import Origin

__all__ = ["ADVICE", "Adjustment"]

#: What each setting does and when to touch it: tooltips, --help and docs/encoder.md say the same.
ADVICE = {
    "alignment": "turns the encoder's directions into those that Anima's adapter was trained on. Start without; turn "
    "it on when viewpoints, poses or composition are not followed",
    "alignment_strength": "how far the mean moves to the stock encoder's: 0 turns only, 1 moves all the way. 0.5 to "
    "begin with; more if pose and viewpoint are still wrong, 0.3 if detail suffers",
    "calibration": "a scale and a bias for each dimension, after the alignment. Last thing to try: it can over-correct",
    "output_scale": "multiplies everything in the end. 1 unless nothing else helps",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Adjustment:
    """`adjustment(states)` is what goes to Anima's adapter, given what left the head."""

    alignment: Alignment | None = None
    alignment_strength: float = 0.5
    calibration: Calibration | None = None
    output_scale: float = 1.0
    force: bool = False

    def __post_init__(self) -> None:
        check_strength(self.alignment_strength)
        if not isinstance(self.output_scale, (int, float)) or not math.isfinite(self.output_scale):
            raise invalid("output_scale", repr(self.output_scale), "a finite number")
        if self.calibration is not None:
            _ = self._coefficients  # its complaints now, and once

    @functools.cached_property
    def _coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.calibration is not None
        return self.calibration.coefficients(self.alignment, self.alignment_strength, force=self.force)

    @classmethod
    def read(
        cls,
        alignment: Alignment | str | os.PathLike[str] | None = None,
        alignment_strength: float = 0.5,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        output_scale: float = 1.0,
        *,
        recurrence: str,
        head_norm: str,
        encoder_hash: str | None = None,
        width: int | None = None,
        force: bool = False,
    ) -> Adjustment:
        """From files or objects, for an encoder of this recurrence, head norm and hash.

        Raises ValueError for files that were fitted to another recurrence (unless forced) or another width, and
        whatever loading raises; warns of another head norm, other weights, or files that do not say.
        """
        if isinstance(alignment, (str, os.PathLike)):
            alignment = Alignment.load(alignment)
        if isinstance(calibration, (str, os.PathLike)):
            calibration = Calibration.load(calibration)
        encoder = Origin(recurrence, head_norm, encoder_hash)
        for name, part, size in (
            ("alignment", alignment, alignment and len(alignment.source_mean)),
            ("calibration", calibration, calibration and len(calibration.scale)),
        ):
            if part is None:
                continue
            part.origin.check(encoder, name, force=force)
            if width is not None and size != width:
                raise invalid(name, f"{size} dimensions", f"{width}, those of the encoder's output")
        return cls(alignment, alignment_strength, calibration, output_scale, force)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., D]` in and out, same type."""
        return next(reversed(self.stages(states).values()))

    def stages(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each step that is on makes of `states`, in order: raw, aligned, calibrated, scaled."""
        found = {"raw": states}
        if self.alignment is not None:
            states = found["aligned"] = self.alignment.apply(states, self.alignment_strength)
        if self.calibration is not None:
            states = found["calibrated"] = affine(states, *self._coefficients)
        if self.output_scale != 1:
            found["scaled"] = states * self.output_scale
        return found
