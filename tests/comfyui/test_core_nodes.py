"""ComfyUI's own nodes that put something else in charge of a model's attention, before and after ours."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masked import apply_masked, scale_self_attention
from sampling import assert_close, regions, sample


def core_node(module, name):
    """A function that runs one of core's nodes, of whichever node API, and the module it is from."""
    try:
        found = importlib.import_module(f"comfy_extras.{module}")
        node = getattr(found, name)
    except (ImportError, AttributeError):
        pytest.skip(f"needs a ComfyUI that has the node {name}")

    def run(*args, **kwargs):
        if hasattr(node, "execute"):
            return node.execute(*args, **kwargs).args[0]
        return getattr(node(), node.FUNCTION)(*args, **kwargs)[0]

    return run, found


class Backend:
    """In the place of one of ComfyUI's attention backends: PyTorch's times `factor`.

    Like the INT8 backend it also takes containers of tensors, which a plain override in front of it must keep away.
    """

    def __init__(self, comfy, factor):
        self._attend, self._factor = comfy.attention.attention_pytorch, factor
        self.shapes = []

    def __call__(self, q, k, v, heads, **kwargs):
        self.shapes.append((q.shape[2], k.shape[2]))
        return self._factor * self._attend(q, k, v, heads, **kwargs)

    def container_function(self, *args, **kwargs):
        raise AssertionError("the backend was given containers although another override is first")


@pytest.fixture
def select_backend(comfy, monkeypatch):
    """(what puts a backend on a model by core's ModelAttentionBackend, that backend)."""
    run, _ = core_node("nodes_model_advanced", "ModelAttentionBackend")
    backend = Backend(comfy, 1.05)
    monkeypatch.setitem(comfy.attention.REGISTERED_ATTENTION_FUNCTIONS, "comfy_kitchen_int8", backend)
    return (lambda model: run(model, "comfy kitchen attention")), backend


@pytest.fixture
def sparse(monkeypatch):
    """(what puts core's BlockSparseAttention on a model, the shapes it served). A GPU kernel is stood in for."""
    run, module = core_node("nodes_sparse_attention", "BlockSparseAttention")
    served = []

    def sol_attn(q, k, v, scale=None, **_):
        served.append((q.shape[1], k.shape[1]))
        q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
        return 1.05 * torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    def ineligible(q, k, v, dim_head):
        return None if q.shape == k.shape else "cross-attention"

    monkeypatch.setattr(module, "_ineligible", ineligible)
    monkeypatch.setattr(module.ck, "sol_attn", sol_attn, raising=False)
    settings = {"selection": {"selection": "sol-attn", "tau": 1.3}, "min_tokens": 0}
    return (lambda model: run(model, start_percent=0.0, end_percent=1.0, **settings)), served


@pytest.mark.parametrize("ours_first", [True, False])
def test_attention_backend(comfy, model, fast, select_backend, ours_first, caplog):
    """The node overwrites whatever override it finds, and hands containers to backends that take them."""
    caplog.set_level(logging.INFO, "anima_fast.comfyui")
    size = (32, 64)  # self- and cross-attention have the same shapes in the stock model
    select, backend = select_backend
    settings, chosen = fast.Settings(), regions(fast, (256, 512))
    if ours_first:
        both = select(fast.apply_regions(model, chosen, settings))
    else:
        both = fast.apply_regions(select(model), chosen, settings)
    out = sample(comfy, both, size=size)
    assert backend.shapes == [(512, 512)] * 20, "the backend has self-attention, and only that"
    assert "Anima Regions: served 20 of 20" in caplog.text
    expected, _ = apply_masked(comfy, model, chosen, settings)
    scale_self_attention(expected, 1.05)
    assert_close(out, sample(comfy, expected, size=size))

    backend.shapes.clear()
    plain = fast.accelerate(model) if ours_first else fast.accelerate(select(model))
    sample(comfy, select(plain) if ours_first else plain)
    assert backend.shapes == [(96, 96)] * 20
    assert "Anima Accelerate: served 20 of 20" in caplog.text


@pytest.mark.parametrize("order", [("ours", "sparse"), ("sparse", "ours"), ("ours", "backend", "sparse"),
                                   ("sparse", "ours", "backend"), ("backend", "sparse", "ours")])  # fmt: skip
def test_block_sparse_attention(comfy, model, fast, sparse, request, order, caplog):
    """The node wraps what it finds and does so again before each step; cross-attention it declines."""
    caplog.set_level(logging.INFO, "anima_fast.comfyui")
    settings, chosen = fast.Settings(), regions(fast)
    put = {"ours": lambda m: fast.apply_regions(m, chosen, settings), "sparse": sparse[0]}
    if "backend" in order:
        put["backend"], backend = request.getfixturevalue("select_backend")
    patched = model
    for name in order:
        patched = put[name](patched)
    out = sample(comfy, patched)
    assert sparse[1] == [(96, 96)] * 20, "block sparse attention has self-attention"
    assert "backend" not in order or not backend.shapes
    assert "Anima Regions: served 20 of 20" in caplog.text
    expected, _ = apply_masked(comfy, model, chosen, settings)
    scale_self_attention(expected, 1.05)
    # The node computes in bfloat16.
    error = (out - sample(comfy, expected)).pow(2).mean().sqrt() / out.std()
    assert error < 0.03


@pytest.mark.slow
def test_torch_compile():
    """In a process of its own: this one's poisoned allocations would be traced too."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, here / "compiled_run.py", os.environ["ANIMA_FAST_COMFYUI"]]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Anima Regions: served") == 8
