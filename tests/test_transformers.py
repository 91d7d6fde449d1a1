"""transformers' recurrent models, tiny and random: the same results with anima_fast's ops as with transformers' own.

All figures are relative to the largest value, in fp32. `Ops` counts what really ran.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# 5.17 is the oldest that looks its functions up as `enable` needs and was tried.
pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17")

import transformers

from anima_fast.integrations import transformers as routing

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
ATTENTION = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=16, mamba_chunk_size=16)
MOE = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16)
DELTA |= dict(layer_types=["linear_attention", "full_attention"])
# family: (configuration class, model class, sizes). Both kinds of layer where the family has both.
MODELS = {
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        SMALL | dict(num_heads=8, head_dim=8, state_size=16, n_groups=2, chunk_size=16),
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", SMALL | ATTENTION | MAMBA | dict(attn_layer_indices=[1])),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        SMALL
        | dict(num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"], intermediate_size=48)
        | dict(mamba_d_state=16, mamba_ngroups=2, n_mamba_heads=8, mamba_headdim=8, chunk_size=16, adapter_rank=4)
        | dict(num_attention_heads=4, num_key_value_heads=4, num_mem_blocks=1),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        dict(vocab_size=64, hidden_size=32, layers_block_type=["mamba", "attention", "mlp", "mamba"], head_dim=8)
        | ATTENTION
        | dict(mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=16, chunk_size=16),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        SMALL
        | ATTENTION
        | MAMBA
        | dict(layer_types=["mamba", "attention"], shared_intermediate_size=32)
        | dict(num_local_experts=2, num_experts_per_tok=1),
    ),
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        SMALL | ATTENTION | MAMBA | dict(mamba_d_ssm=64, head_dim=8),
    ),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", SMALL | ATTENTION | DELTA | MOE | dict(head_dim=8)),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", SMALL | ATTENTION | DELTA | dict(head_dim=32)),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        SMALL | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32) | DELTA | MOE,
    ),
}
FAMILY = pytest.mark.parametrize("family", MODELS)
TOLERANCE = 1e-4


def prefill_ops(family: str) -> set[str]:
    return {"causal_conv1d", "gated_delta_rule" if family.startswith("qwen") else "ssd_chunk_scan"}


def decode_ops(family: str) -> set[str]:
    return {"causal_conv1d_update", "gated_delta_step" if family.startswith("qwen") else "ssd_state_update"}


class Ops(TorchDispatchMode):
    """Counts the calls of anima_fast's ops."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "anima_fast":
            self.count[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def make(family: str, **changed):
    """The model, with weights large enough for every layer to matter."""
    config, model, sizes = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**(sizes | changed)))
    model.eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif name.endswith((".D", "bias")):
            p.add_(torch.randn_like(p) * 0.5)
    return model


build = functools.cache(make)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))


def relative(got, expected) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def both(run):
    """run() with transformers' own functions, then with ours: two results and the ops that ran."""
    expected = run()
    with routing.enable(), Ops() as ops:
        got = run()
    return got, expected, ops.count


@pytest.fixture(autouse=True)
def _off_again():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small a second thread only waits for the first
    yield
    torch.set_num_threads(threads)
    routing.disable()


@FAMILY
def test_prefill(family):
    model = build(family)  # made before `enable`
    ids = tokens(2, 37)
    got, expected, ops = both(lambda: model(ids, output_hidden_states=True, use_cache=False))
    assert ops.keys() == prefill_ops(family)
    assert relative(got.logits, expected.logits) < TOLERANCE
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert relative(ours, theirs) < TOLERANCE


def decode(model, ids, steps, attention_mask=None):
    """Logits of a prefill, of one token at a time, and of a chunk of 5 on the cache."""
    length = ids.shape[1] - steps - 5
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, outputs = None, []
    for start, end in [(0, length), *((i, i + 1) for i in range(length, length + steps)), (length + steps, None)]:
        if model.config.model_type == "mamba2":
            arguments = dict(cache_params=cache)
        else:
            arguments = dict(past_key_values=cache, position_ids=positions[:, start:end])
        mask_given = None if attention_mask is None else attention_mask[:, :end]
        out = model(ids[:, start:end], attention_mask=mask_given, use_cache=True, **arguments)
        cache = out[next(iter(arguments))]
        outputs.append(out.logits)
    return torch.cat(outputs, dim=1)


@FAMILY
def test_cached_decoding(family):
    model, ids = build(family), tokens(2, 29)
    got, expected, ops = both(lambda: decode(model, ids, steps=4))
    assert ops.keys() == prefill_ops(family) | decode_ops(family)
    assert relative(got, expected) < TOLERANCE
    # As near to the whole sequence at once as transformers' own, which leaves out the limit on dt of zamba2 and
    # nemotron_h when it decodes.
    whole = model(ids, use_cache=False).logits
    assert relative(got, whole) <= relative(expected, whole) + TOLERANCE


@FAMILY
def test_left_padding(family):
    model, ids = build(family), tokens(2, 29)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    got, expected, ops = both(lambda: decode(model, ids, 3, mask))
    assert ops.keys() == prefill_ops(family) | decode_ops(family)
    real = mask.bool()
    assert relative(got[real], expected[real]) < TOLERANCE
    # Padding changes as little as it does in transformers' own.
    alone = decode(model, ids[1:, 7:], 3)
    assert relative(got[1:, 7:], alone) <= relative(expected[1:, 7:], alone) + TOLERANCE


@FAMILY
def test_generate(family):
    model, ids = build(family), tokens(2, 11)
    got, expected, ops = both(lambda: model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(got, expected) and got.shape[1] > 12
    assert ops.keys() == prefill_ops(family) | decode_ops(family)


@FAMILY
@pytest.mark.parametrize("told_by", ["seq_idx", "cu_seq_lens_q"])
def test_packed_sequences(family, told_by):
    """Sequences packed into one row are the sequences alone. (transformers' own functions refuse or mix them.)"""
    sizes = {"layer_types": ["mamba", "mamba"]} if family == "granitemoehybrid" else {}  # its attention does not pack
    model = make(family, **sizes)
    model = getattr(model, "backbone", model)  # Mamba2ForCausalLM keeps these arguments to itself
    parts = [(0, 9), (9, 11), (11, 33)]
    ids, bounds = tokens(1, 33), torch.tensor([0, 9, 11, 33], dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds}
    if told_by == "seq_idx":
        packing = {"seq_idx": torch.bucketize(torch.arange(33), bounds[1:], right=True).int()[None]}
        if family.startswith("qwen"):
            packing["cu_seq_lens_q"] = bounds
    if family != "mamba2":
        packing["position_ids"] = torch.cat([torch.arange(end - start) for start, end in parts])[None]
    with routing.enable(), Ops() as ops:
        got = model(ids, use_cache=False, **packing)[0]
        for start, end in parts:
            alone = model(ids[:, start:end], use_cache=False)[0]
            assert relative(got[:, start:end], alone) < TOLERANCE
    assert ops.count.keys() == prefill_ops(family)


def test_packed_sequences_and_a_cache():
    """The convolution's input then begins with cached or padding tokens: bounds count from the right."""
    assert routing._seq_idx(torch.tensor([0, 3, 3, 5]), 7).tolist() == [[0, 0, 0, 0, 0, 2, 2]]
    model, ids = build("mamba2").backbone, tokens(1, 3)  # fewer than the convolution is wide
    with routing.enable():
        got = model(ids, use_cache=True, cu_seq_lens_q=torch.tensor([0, 1, 3]))[0]
        for part in (slice(0, 1), slice(1, 3)):
            assert relative(got[:, part], model(ids[:, part], use_cache=False)[0]) < TOLERANCE


def test_the_delta_rule_needs_the_bounds():
    with routing.enable(), pytest.raises(ValueError, match="^cu_seq_lens_q: got None with seq_idx"):
        build("qwen3_5")(tokens(1, 8), use_cache=False, seq_idx=torch.zeros(1, 8, dtype=torch.int32))


@FAMILY
def test_training_keeps_transformers_own_functions(family):
    """The gradient is theirs, with routing on as with it off."""
    config, model, sizes = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**sizes)).train()

    def gradient():
        model.zero_grad()
        model(tokens(2, 12), use_cache=False).logits.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    got, expected, ops = both(gradient)
    assert not ops and torch.equal(got, expected)
    # in training mode without gradients, ours
    with torch.no_grad():
        got, expected, ops = both(lambda: model(tokens(2, 12), use_cache=False).logits)
    assert ops.keys() == prefill_ops(family)
    assert relative(got, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "qwen3_next"])
def test_bfloat16(family):
    """Not farther from fp32 than twice transformers' own bf16 is."""
    model, ids = build(family), tokens(2, 37)
    exact = decode(model, ids, 3)
    half = getattr(transformers, MODELS[family][1])(model.config).eval().requires_grad_(False)
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    got, expected, _ = both(lambda: decode(half, ids, 3))
    assert relative(got, exact) <= 2 * relative(expected, exact) + 2 * torch.finfo(torch.bfloat16).eps


def functions() -> dict:
    modules = {f: sys.modules[f"transformers.models.{f}.modeling_{f}"] for f in MODELS}
    return {(f, name): value for f, m in modules.items() for name, value in vars(m).items()}


def test_disable_restores_every_object():
    for family in MODELS:
        build(family)
    before = functions()
    assert routing.enable().families == tuple(MODELS) == tuple(routing.FAMILIES)
    changed = {key for key, value in functions().items() if value is not before[key]}
    assert changed == {(f, name) for f, names in routing.FAMILIES.items() for name in names}
    routing.disable()
    after = functions()
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)


def test_a_block_ends_only_what_it_began():
    build("mamba2")
    before = functions()
    with pytest.raises(KeyError), routing.enable():
        assert functions() != before
        raise KeyError
    assert functions() == before
    routing.enable()
    with routing.enable() as inner:
        assert inner.families == tuple(routing.FAMILIES)
    assert functions() != before, "the outer enable still holds"
    routing.disable()
    routing.disable()
    assert functions() == before


def test_a_family_without_a_hook_is_named(monkeypatch):
    """As in a transformers whose layers keep their functions: one warning, and the family stays as it is."""
    monkeypatch.setitem(routing.FAMILIES, "bamba", {"no_such_function": print})
    monkeypatch.setitem(routing.FAMILIES, "no_such_model", {"no_such_function": print})
    with pytest.warns(UserWarning, match=f"does not route bamba: in transformers {transformers.__version__}") as caught:
        on = routing.enable()
    assert len(caught) == 1
    assert on.families == tuple(f for f in MODELS if f != "bamba")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert routing.enable().families == on.families


def test_compat_install_is_what_transformers_finds():
    """Before a model file is imported, `compat.install` is enough."""
    if any(map(importlib.util.find_spec, ("mamba_ssm", "fla", "causal_conv1d"))):
        pytest.skip("an original is installed")
    script = """
from anima_fast.integrations import compat
compat.install()
import torch, test_transformers as t
torch.set_num_threads(1)
from transformers.utils import import_utils
assert import_utils._is_package_available("mamba_ssm", return_version=True) == (True, "2.3.2.post1+anima.fast")
for family in ("mamba2", "qwen3_5"):
    with t.Ops() as ops:
        t.decode(t.build(family), t.tokens(1, 12), 2)
    assert ops.count.keys() == t.prefill_ops(family) | t.decode_ops(family), ops.count
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=__file__.rpartition("/")[0] or "."
    )
    assert done.returncode == 0, done.stderr
    assert "falling back" not in done.stderr
