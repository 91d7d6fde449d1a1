"""anima-regional-comfy-nodes, run as its authors run it, and with its inner attention replaced by ours.

It needs a checkout of that pack as well: ANIMA_FAST_REGIONAL_NODES.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import tiny_anima
import torch
from sampling import NEGATIVE, assert_close, sample

PACK = os.environ.get("ANIMA_FAST_REGIONAL_NODES")
pytestmark = pytest.mark.skipif(
    not PACK, reason="needs anima-regional-comfy-nodes: set ANIMA_FAST_REGIONAL_NODES to a checkout of it"
)

# docs/node-packs.md: where the pack has told that a call is its own, and before it materialises anything.
BEFORE = "    bias_nq = bias_template.shape[-2]\n"
PATCH = """\
    from anima_fast.integrations.comfyui import accelerate_bias_override
    return accelerate_bias_override(orig_attention_fn, q, k, v, heads, template=bias_template, **kwargs)
"""


def load(name, patched, folder):
    """The pack's modules as a package of that name; patched in a copy."""
    for file in ("__init__.py", "nodes.py", "regional_core.py"):
        text = (Path(PACK) / file).read_text(encoding="utf-8")
        if patched and file == "nodes.py":
            assert text.count(BEFORE) == 1
            text = text.replace(BEFORE, PATCH + BEFORE)
        (folder / file).write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def packs(comfy, tmp_path_factory):
    return [load(f"regional_nodes_{i}", bool(i), tmp_path_factory.mktemp("pack")) for i in range(2)]


def prompts():
    return [tiny_anima.conditioning(n, seed) for n, seed in ((12, 3), (15, 4), (10, 6))]


def masks():
    left = torch.zeros(1, 128, 192)
    left[:, :, :80] = 1
    right = torch.zeros(1, 128, 192)
    right[:, :, 72:] = 0.75
    return left, right


def pack_sample(
    comfy, nodes, model, *, base=True, position="last", overlaps=True, window=(0.0, 1.0), negative=NEGATIVE, **bias
):
    """The pack's workflow: its four nodes, then the sampler."""
    one, two, whole = prompts()
    joined, ranges = nodes["AnimaRegionalConditioningConcat"]().concat(one, position, two, base=whole if base else None)
    latent = {"samples": torch.zeros(1, 16, 16, 24)}
    left, right = masks()
    weights = nodes["AnimaMaskToTokenGrid"]().build(model, latent, left, "area", overlaps, right)[0]
    settings = dict(
        mode="soft_log", eps=1e-4, hard_value=-80.0, strength=0.35, base_always_allowed=True, unmasked_to_base=True
    )
    template = nodes["AnimaBuildRegionalCrossAttnBias"]().build(ranges, weights, **{**settings, **bias})[0]
    positive, negative = nodes["AnimaApplyRegionalAttentionHook"]().apply(
        joined, negative, template, start_percent=window[0], end_percent=window[1], model=model
    )
    return sample(comfy, model, positive=positive, negative=negative)


CASES = {
    "defaults": dict(),
    "hard": dict(mode="hard"),
    "hard, whole strength": dict(mode="hard", strength=1.0, base_always_allowed=False),
    "no base": dict(base=False),
    "base first, no overlap rule": dict(position="first", overlaps=False),
    "window": dict(window=(0.3, 0.9)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_picture_with_the_inner_attention_replaced(comfy, model, packs, name):
    theirs, ours = (pack_sample(comfy, nodes, model, **CASES[name]) for nodes in packs)
    assert_close(ours, theirs)
    unbiased = pack_sample(comfy, packs[0], model, **{**CASES[name], "strength": 0.0})
    assert (theirs - unbiased).abs().max() > 0.01 * theirs.abs().max(), "the pack must have acted"


def test_uncond_of_another_length_runs_by_itself(comfy, model, packs):
    theirs, ours = (pack_sample(comfy, nodes, model, negative=tiny_anima.conditioning(600, 8)) for nodes in packs)
    assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["soft_log", "hard"])
def test_the_four_steps_as_plain_functions(comfy, model, fast, packs, mode):
    one, two, whole = prompts()
    joined, ranges = fast.concatenate([one, two], whole)
    weights = fast.masks_to_token_grid(masks(), 16, 24)
    plan = fast.build_bias(ranges, weights, mode=mode)
    out = sample(comfy, fast.apply_plan(model, plan), positive=joined)
    assert_close(out, pack_sample(comfy, packs[0], model, mode=mode))
