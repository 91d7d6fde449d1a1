"""Whole models with anima_fast.integrations.transformers on and off: prefill of random tokens, random fp32 weights.

    mamba2    a Mamba2 stack of the 2.7b model's width: hidden 2560, H 80, P 64, N 128, G 1; 4 of its 64 layers
    encoder   a stack of the width of Anima's text encoder (Qwen3.5-4B): hidden 2560, 16 key and 32 value heads of 128;
              4 of its 32 layers, 3 with the gated delta rule and 1 with attention, which is how all 32 alternate

"off" is transformers as it is installed: its functions in torch, unless kernel packages replace them. Both give the
last hidden state, and the two must agree to 1e-3 of its largest value before anything is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import invalid
from .rounds import Progress, run_rounds
from .scan_measure import ScanResult, sampler

__all__ = ["MODELS", "Model", "ModelResults", "measure_models"]

_TOLERANCE = 1e-3
_VOCABULARY = 1024  # the embedding is a look-up: its size costs memory, not time


class Model(NamedTuple):
    """A stack in transformers, and how many such stacks make up the model it stands for."""

    family: str
    config: str
    model: str
    sizes: dict[str, Any]
    times: int
    whole: str


MODELS = {
    "mamba2": Model(
        "mamba2",
        "Mamba2Config",
        "Mamba2Model",
        dict(hidden_size=2560, num_hidden_layers=4, num_heads=80, head_dim=64, state_size=128, n_groups=1),
        16,
        "64 layers of mamba2-2.7b",
    ),
    "encoder": Model(
        "qwen3_5",
        "Qwen3_5TextConfig",
        "Qwen3_5TextModel",
        dict(hidden_size=2560, intermediate_size=9216, num_hidden_layers=4, num_attention_heads=16)
        | dict(num_key_value_heads=4, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32)
        | dict(linear_key_head_dim=128, linear_value_head_dim=128)
        | dict(layer_types=["linear_attention"] * 3 + ["full_attention"]),
        8,
        "32 layers of the encoder, 24 of them recurrent",
    ),
}


@dataclasses.dataclass
class ModelResults:
    """One stack at one length: `off` and `on`, and the whole model that so many stacks make up."""

    name: str
    length: int
    model: Model
    results: list[ScanResult]

    def tokens_per_second(self, result: ScanResult) -> float | None:
        return 1e3 * self.length / result.median_ms if result.median_ms else None

    def __str__(self) -> str:
        layers = self.model.sizes["num_hidden_layers"]
        return f"model {self.name}, {layers} layers, hidden {self.model.sizes['hidden_size']}, L {self.length}, fp32"

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": str(self),
            "name": self.name,
            "length": self.length,
            "sizes": self.model.sizes,
            "stacks_of_the_whole": self.model.times,
            "results": [{**r.as_dict(), "tokens_per_second": self.tokens_per_second(r)} for r in self.results],
        }


def measure_models(
    lengths: Sequence[int], rounds: int, device: str = "cpu", progress: Progress = lambda what: None
) -> list[ModelResults]:
    """Every model at every length, transformers alone against routed through anima_fast."""
    if importlib.util.find_spec("transformers") is None:
        raise invalid("--models", "no transformers", "pip install 'anima-fast[transformers]', or no --models")
    done = []
    for name, model in MODELS.items():
        stack = _build(model, device)
        for length in lengths:
            done.append(ModelResults(name, length, model, _measure(stack, length, rounds, progress)))
        del stack
    return done


def _build(model: Model, device: str) -> torch.nn.Module:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, model.config)(vocab_size=_VOCABULARY, **model.sizes)
    stack: torch.nn.Module = getattr(transformers, model.model)(config)
    return stack.eval().requires_grad_(False).to(device)


def _measure(stack: torch.nn.Module, length: int, rounds: int, progress: Progress) -> list[ScanResult]:
    from ..integrations import transformers as routing

    device = next(stack.parameters()).device
    tokens = torch.randint(_VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(device)

    def forward() -> torch.Tensor:
        hidden: torch.Tensor = stack(tokens, use_cache=False).last_hidden_state
        return hidden

    results, running = [], []
    outs: list[torch.Tensor] = []
    with torch.no_grad():
        for name, kind, summary, context in (
            ("off", "peer", "transformers as it is installed", contextlib.nullcontext),
            ("on", "backend", "routed through anima_fast", routing.enable),
        ):
            progress(f"checking {name}")
            result = ScanResult(name, kind, summary, "measured", bound=_TOLERANCE)
            results.append(result)
            with context():
                outs.append(forward())
                largest = float(outs[0].abs().max())
                result.error = float((outs[-1] - outs[0]).abs().max()) / largest
                if not result.error <= _TOLERANCE:
                    result.status, result.reason = "gate failed", f"differs from off by {result.error:.3g}"
                    continue
                sample = sampler(forward, device, result)
            running.append((result, _within(context, sample)))
        run_rounds(running, rounds, progress)
    return results


def _within(context: Callable[[], Any], sample: Callable[[], float]) -> Callable[[], float]:
    """The sample taken inside a context that is entered outside the time."""

    def inside() -> float:
        with context():
            return sample()

    return inside
