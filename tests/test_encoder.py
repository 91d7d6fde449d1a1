"""The text encoder: against transformers' Qwen3.5, against a sequential Mamba2, and against hostile files."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from pathlib import Path

import pytest
import sequential_mamba2
import tiny_encoder
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import BASE, CONFIG

pytest.importorskip(
    "transformers.models.qwen3_5", reason="needs transformers with Qwen3.5 (pip install -U transformers)"
)

from anima_fast import encoder
from anima_fast.encoder import ExpRMSNorm
from anima_fast.encoder.checkpoint import EncoderConfig, read_checkpoint
from anima_fast.encoder.head import norm_report
from anima_fast.encoder.model import GatedDeltaNet, Linear, TextEncoder, widen
from anima_fast.encoder.prompts import batches, pieces
from anima_fast.encoder.tokenizer import check_tokenizer

TOLERANCE = 1e-5
RECURRENCES = ("gdn", "mamba2")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny_encoder.save(tmp_path_factory.mktemp("encoder") / "tiny.safetensors")


def qwen(config, tensors):
    """transformers' own model of a base configuration, nothing of ours in it."""
    from transformers import Qwen3_5TextConfig, Qwen3_5TextModel

    sizes = dataclasses.asdict(config)
    for name in ("head_size", "last_mlp", "rope_theta", "partial_rotary_factor"):
        del sizes[name]
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    rope["partial_rotary_factor"] = config.partial_rotary_factor
    sizes["layer_types"] = list(sizes["layer_types"])
    model = Qwen3_5TextModel(
        Qwen3_5TextConfig(**sizes, num_hidden_layers=len(config.layer_types), rope_parameters=rope)
    )
    model.load_state_dict(tensors, assign=True)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def random_ids(length, rows=CONFIG.vocab_size, seed=0):
    return torch.randint(0, rows, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def initialised(config, seed=0):
    """Random tensors as transformers initialises them, norms moved off their start."""
    torch.manual_seed(seed)
    model = qwen(config, tiny_encoder.tensors(config))
    parameters = type(model)(model.config).named_parameters()
    return {name: p.data + 0.1 * torch.randn(p.shape) * ("norm" in name) for name, p in parameters}


# gdn


LENGTHS = (1, 2, 3, 4, 5, 16, 31, 63, 64, 65, 77, 127, 128, 129, 191, 193, 255, 257, 300)


def against_qwen(tensors, lengths, ops=True, relative=False):
    expected, ours = qwen(BASE, tensors), TextEncoder(BASE, tensors, ops=ops)
    assert any(isinstance(m, GatedDeltaNet) for m in ours.modules()) == ops
    with torch.no_grad():
        for length in lengths:
            ids = torch.tensor([random_ids(length, seed=length)])
            states = expected(input_ids=ids).last_hidden_state
            error = (ours(ids) - states).abs().max()
            assert error < TOLERANCE * (states.abs().max() if relative else 1), f"length {length}: {error:.2e}"


@pytest.mark.parametrize("ops", [True, False], ids=["our ops", "transformers' functions"])
def test_gdn_is_transformers_qwen(ops):
    against_qwen(initialised(BASE), LENGTHS, ops)


def test_gdn_is_transformers_qwen_at_every_length():
    against_qwen(initialised(BASE), range(1, 301))


def test_gdn_with_larger_weights():
    """Of a trained model's scale. Normalising what a head recalls amplifies rounding: both implementations are then
    as far from fp64 as from each other."""
    against_qwen(tiny_encoder.tensors(BASE), LENGTHS[::3], relative=True)


@torch.no_grad()
def test_gdn_batched_and_padded():
    """Against transformers with its padding mask: whatever lies on the pads, no real token changes."""
    tensors = initialised(BASE)
    expected, ours = qwen(BASE, tensors), TextEncoder(BASE, tensors)
    lengths = (1, 300, 64, 77, 129, 3)
    ids, mask = torch.randint(0, 320, (len(lengths), 300)), torch.zeros(len(lengths), 300, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    out, reference = ours(ids), expected(input_ids=ids, attention_mask=mask).last_hidden_state
    assert (out - reference)[mask.bool()].abs().max() < TOLERANCE
    for row, length in enumerate(lengths):
        alone = expected(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
        assert (out[row, :length] - alone).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_gdn_at_full_width(kind):
    """One layer of Qwen3.5-4B's sizes, MLP included."""
    config = EncoderConfig(vocab_size=64, layer_types=(kind,), head_size=None, last_mlp=True)
    tensors = tiny_encoder.tensors(config)
    expected, ours = qwen(config, tensors), TextEncoder(config, tensors)
    for length in (1, 77, 300):
        ids = torch.tensor([random_ids(length, 64)])
        error = (ours(ids) - expected(input_ids=ids).last_hidden_state).abs().max()
        assert error < TOLERANCE, f"length {length}: {error:.2e}"


@torch.no_grad()
def test_gdn_with_a_head_and_without_the_last_mlp(file):
    """The companion layout is transformers' layers, then the head."""
    tensors = load_file(file)
    whole = tiny_encoder.tensors(dataclasses.replace(CONFIG, head_size=None, last_mlp=True), seed=1)
    whole |= {name: t for name, t in tensors.items() if not name.startswith("norm.")}
    last = f"layers.{CONFIG.num_hidden_layers - 1}.mlp.down_proj.weight"
    whole[last] = torch.zeros_like(whole[last])
    model, states = qwen(BASE, whole), []
    model.layers[-1].register_forward_hook(lambda *args: states.append(args[-1]))
    ids = random_ids(50)
    model(input_ids=torch.tensor([ids]))
    expected = sequential_mamba2.head(tensors, states[0][0].double())
    out, _ = encoder.load(file).encode_ids([ids])
    assert (out[0] - expected).abs().max() < TOLERANCE


# mamba2


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 130])
def test_mamba2_is_the_sequential_reading(file, length):
    tensors, ids = load_file(file), random_ids(length, seed=length)
    states = sequential_mamba2.hidden(tensors, CONFIG.num_hidden_layers, ids)
    model = encoder.load(file, "mamba2").model
    with torch.no_grad():
        ours = model.hidden(model.model.embed_tokens(torch.tensor([ids])))[0]
        assert (ours - states).abs().max() < TOLERANCE
        error = (model(torch.tensor([ids]))[0] - sequential_mamba2.head(tensors, states)).abs().max()
    assert error < TOLERANCE


def test_the_readings_differ(file):
    ids = [random_ids(20)]
    gdn, mamba2 = (encoder.load(file, recurrence).encode_ids(ids)[0] for recurrence in RECURRENCES)
    assert torch.nn.functional.cosine_similarity(gdn, mamba2, dim=-1).mean() < 0.9


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_every_tensor_matters(recurrence):
    model, ids = TextEncoder(CONFIG, tiny_encoder.tensors(), recurrence), torch.tensor([random_ids(12)])
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(CONFIG.shapes())
    with torch.no_grad():
        before = model(ids)
        for name, p in parameters.items():
            kept = p.clone()
            p += 0.1 * torch.randn(p.shape, generator=generator)
            assert (model(ids) - before).abs().max() > 1e-4, name
            p.copy_(kept)
        assert torch.equal(model(ids), before)


# the head


def test_exp_rms_norm():
    x, w = torch.randn(3, 7, 24), 0.1 * torch.randn(24)
    for name, factor in (("exp", w.exp()), ("one_plus", 1 + w)):
        norm = ExpRMSNorm(24, name)
        assert torch.allclose(norm(x).square().mean(-1), torch.ones(3, 7), atol=1e-4)  # weight 0: nothing but the norm
        norm.weight.data.copy_(w)
        assert torch.allclose(norm(x), factor * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-6)
    with pytest.raises(ValueError, match="head_norm: got 'plain'; allowed: 'exp' | 'one_plus'"):
        ExpRMSNorm(24, "plain")


def test_norm_report(file, caplog):
    caplog.set_level("INFO", "anima_fast.encoder")
    report = norm_report(torch.tensor([0.0, 0.2, -0.5]))
    assert report["max_abs"] == pytest.approx(0.5)
    assert report["difference"] == pytest.approx(0.1065, abs=1e-4)  # exp(-0.5) - 0.5
    loaded = encoder.load(file)
    assert "exp(w) and 1 + w differ by at most 1.0e-03" in caplog.text
    assert loaded.info()["norm"] == norm_report(load_file(file)["norm.1.weight"])
    other = encoder.load(file, head_norm="one_plus")
    difference = (loaded.encode_ids([[1, 2, 3]])[0] - other.encode_ids([[1, 2, 3]])[0]).abs().max()
    assert 0 < difference < 0.05


# files


def test_layouts_and_prefixes(tmp_path, file):
    expected, _ = encoder.load(file).encode_ids([[1, 2, 3]])
    for prefix in ("model.", "model.language_model."):
        other = tiny_encoder.save(tmp_path / "prefixed.safetensors", prefix=prefix)
        assert torch.equal(encoder.load(other).encode_ids([[1, 2, 3]])[0], expected)
    # transformers' own whole model: shards, other parts, a configuration
    home = tmp_path / "qwen"
    home.mkdir()
    tensors = {f"model.language_model.{name}": t for name, t in tiny_encoder.tensors(BASE).items()}
    tensors |= {"model.visual.blocks.0.attn.qkv.weight": torch.ones(3, 3), "mtp.fc.weight": torch.ones(2, 2)}
    tensors["lm_head.weight"] = torch.ones(320, 32)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, home / shard)
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    rope = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    text = {"model_type": "qwen3_5_text", "hidden_size": 32, "num_hidden_layers": 5, "rope_parameters": rope}
    (home / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    loaded = encoder.load(home)
    config = dataclasses.replace(BASE, rope_theta=5e5, partial_rotary_factor=0.5)
    assert loaded.config == config and loaded.info()["other_parts"] == 3 and loaded.info()["head_norm"] is None
    with torch.no_grad():
        states = qwen(config, tiny_encoder.tensors(BASE))(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state
    assert (loaded.encode_ids([[1, 2, 3]])[0] - states).abs().max() < TOLERANCE


def test_full_configuration_is_the_published_one():
    config = EncoderConfig()
    assert len(config.shapes()) == 426
    assert sum(torch.Size(shape).numel() for shape in config.shapes().values()) == 4_138_640_384
    base = dataclasses.replace(config, head_size=None, last_mlp=True)
    assert len(base.shapes()) == 426  # by coincidence, the base model has as many


@pytest.mark.parametrize(
    "how", [dict(fp8=True, dtype=torch.bfloat16), dict(dtype=torch.bfloat16), dict(dtype=torch.float16)]
)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_stored_types(tmp_path, how, recurrence):
    """Weights keep the file's type, in the file's own memory, and give what the widened ones give."""
    path = tiny_encoder.save(tmp_path / "x.safetensors", **how)
    loaded = encoder.load(path, recurrence)
    stored = load_file(path)
    for name, p in loaded.model.named_parameters():
        tensor = stored[name.removeprefix("model.")]
        assert p.dtype == (tensor.dtype if tensor.ndim == 2 else torch.float32)
    wide = TextEncoder(CONFIG, {name: t.float() for name, t in stored.items()}, recurrence)
    ids = random_ids(40)
    with torch.no_grad():
        assert (loaded.encode_ids([ids])[0] - wide(torch.tensor([ids]))).abs().max() < TOLERANCE
        half = encoder.load(path, recurrence, dtype=torch.bfloat16).encode_ids([ids])[0]
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half, wide(torch.tensor([ids])), dim=-1).mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widening_is_exact(dtype):
    """Every FP8 number, subnormal ones and the largest too."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    wide = widen(numbers, torch.empty(254, dtype=dtype))
    assert torch.equal(wide, numbers.to(dtype)) and torch.equal(wide.signbit(), numbers.float().signbit())
    for narrow in (torch.bfloat16, torch.float16):
        x = torch.randn(50).to(narrow)
        assert torch.equal(widen(x, torch.empty(50, dtype=dtype)), x.to(dtype))


def test_linear_in_blocks(monkeypatch):
    """Against one product with the widened matrix, for blocks that do not divide the rows."""
    monkeypatch.setattr("anima_fast.encoder.model._BLOCK", 100)
    for stored in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        layer = Linear(24, 37, bias=True)
        layer.load_state_dict({"weight": torch.randn(37, 24).to(stored), "bias": torch.randn(37)}, assign=True)
        for shape in ((2, 5, 24), (1, 24), (0, 3, 24)):
            x = torch.randn(shape)
            expected = x @ layer.weight.float().T + layer.bias
            assert torch.allclose(layer(x), expected, atol=1e-5)


def test_weights_stay_in_the_file(tmp_path):
    """Memory-mapped: the matrices' addresses lie in a mapping of the file."""
    path = tiny_encoder.save(tmp_path / "mapped.safetensors", fp8=True, dtype=torch.bfloat16)
    loaded = encoder.load(path)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs /proc/self/maps: run this test on Linux")
    lines = [line for line in maps.read_text().splitlines() if line.endswith("mapped.safetensors")]
    ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in lines]
    for name, p in loaded.model.named_parameters():
        if p.ndim == 2:
            assert any(low <= p.data_ptr() < high for low, high in ranges), name


def rewrite(path, change, metadata=None):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def put(**changed):
    return lambda tensors: tensors.update({name.replace("__", "."): value for name, value in changed.items()})


Z, QKV = "layers.1.linear_attn.in_proj_z.weight", "layers.0.linear_attn.in_proj_qkv.weight"
HOSTILE = {
    "missing": (lambda t: t.pop(Z), f"missing {Z}"),
    "missing and extra": (
        lambda t: t.update({"layers.1.linear_attn.z": t.pop(Z)}),
        f"missing {Z}; not of this model layers.1.linear_attn.z",
    ),
    "extra": (lambda t: t.update({"extra.weight": torch.ones(3)}), "not of this model extra.weight"),
    "under another prefix too": (lambda t: t.update({f"model.{Z}": t[Z].clone()}), f"not of this model model.{Z}"),
    "narrow": (lambda t: t.update({Z: t[Z][:, :-1].clone()}), rf"wrong shape {Z} \[32, 31\], not \[32, 32\]"),
    "short": (lambda t: t.update({Z: t[Z][:-1].clone()}), rf"wrong shape {Z} \[31, 32\], not \[32, 32\]"),
    "first of its kind": (lambda t: t.update({QKV: t[QKV][:-8].clone()}), rf"{QKV} \[56, 32\], not \[64, 32\]"),
    "another rank": (lambda t: t.update({Z: t[Z].flatten()}), rf"wrong shape {Z} \[1024\], not \[32, 32\]"),
    "head": (lambda t: t.update({"norm.1.weight": torch.ones(8)}), r"norm.1.weight \[8\], not \[24\]"),
    "half a head": (lambda t: t.pop("norm.3.bias"), "missing norm.3.bias"),
    "no head": (lambda t: [t.pop(n) for n in list(t) if n.startswith("norm.")], "missing norm.0.weight, norm.0.bias"),
    "head and final norm": (lambda t: t.update({"norm.weight": torch.ones(32)}), "not of this model norm.weight"),
    "a layer gone": (lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.1.")], "missing layers.1.input_lay"),
    "a middle MLP gone": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.1.mlp.")],
        "missing layers.1.mlp.gate",
    ),
    "both kinds": (lambda t: t.update({"layers.0.self_attn.q_norm.weight": torch.ones(16)}), "layers.0"),
    "far layer": (lambda t: t.update({"layers.900000000.input_layernorm.weight": torch.ones(32)}), "900000001 layers"),
    "integers": (lambda t: t.update({Z: t[Z].to(torch.int32)}), rf"{Z} \(I32\); allowed: .*F8_E4M3 | BF16"),
    "double": (lambda t: t.update({Z: t[Z].double()}), rf"{Z} \(F64\)"),
    "E5M2": (lambda t: t.update({Z: t[Z].to(torch.float8_e5m2)}), rf"{Z} \(F8_E5M2\)"),
    "scaled FP8": (
        lambda t: t.update({"layers.1.linear_attn.in_proj_z.scale_weight": torch.ones(1)}),
        "scaled FP8 is not",
    ),
    "NaN": (lambda t: t[Z].view(-1)[5].fill_(torch.nan), f"NaN or infinity in {Z}"),
    "infinity": (lambda t: t["norm.0.bias"][2].fill_(-torch.inf), "NaN or infinity in norm.0.bias"),
    "NaN in BF16": (lambda t: t.update({Z: torch.full((32, 32), torch.nan, dtype=torch.bfloat16)}), f"infinity in {Z}"),
    "infinity in FP16": (
        lambda t: t.update({Z: torch.full((32, 32), torch.inf, dtype=torch.float16)}),
        f"infinity in {Z}",
    ),
    "NaN in FP8": (
        lambda t: t.update({Z: torch.full((32, 32), -torch.nan).to(torch.float8_e4m3fn)}),
        f"infinity in {Z}",
    ),
    "prefix": (
        lambda t: [t.update({f"text_encoder.{n}": t.pop(n)}) for n in list(t)],
        "tensors under 'text_encoder.'; allowed: .*'model.language_model.'",
    ),
    "Qwen3": (
        lambda t: [t.pop(n) for n in list(t) if ".linear_attn." in n],
        r"without a recurrent layer \(linear_attn\), as Qwen3",
    ),
    "another model": (
        lambda t: [t.pop(n) for n in list(t) if n != "norm.0.bias"],
        "norm.0.bias, no Qwen3.5 text model",
    ),
    "empty": (lambda t: t.clear(), "no tensor, no Qwen3.5"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors(tmp_path, case):
    change, message = HOSTILE[case]
    path = tiny_encoder.save(tmp_path / "x.safetensors", with_tokenizer=False)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        encoder.load(path)
    assert str(caught.value).startswith("path: got ") and "x.safetensors" in str(caught.value)


def test_hostile_bytes(tmp_path, file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    damaged = {
        "empty": b"",
        "seven bytes": data[:7],
        "half a header": data[: length // 2],
        "header only": data[: 8 + length],
        "one byte short": data[:-1],
        "one byte long": data + b"x",
        "huge header": struct.pack("<Q", 2**62) + data[8:],
        "not JSON": data[:8] + b"{" * length + data[8 + length :],
        "a pickle": b"\x80\x04K\x01.",
    }
    for name, content in damaged.items():
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="which cannot be read .*; allowed: a whole safetensors file"):
            encoder.load(path), pytest.fail(name)
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(ValueError, match="a .safetensors file \\(no pickles: they can run code\\)"):
        encoder.load(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="no file or directory .*absent"):
        encoder.load(tmp_path / "absent.safetensors")


def test_hostile_directories(tmp_path, file):
    with pytest.raises(ValueError, match="with no .safetensors file"):
        encoder.load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ("{", "which cannot be read"),
        ("[]", "which cannot be read"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "shard '../x.safetensors'"),
        ('{"weight_map": {"a": "x.bin"}}', "shard 'x.bin'"),
        ('{"weight_map": {"a": 3}}', "shard 3"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            encoder.load(tmp_path)
    index.write_text('{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="no shard"):
        encoder.load(tmp_path)
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors").write_bytes(file.read_bytes())
    index.write_text('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}')
    with pytest.raises(ValueError, match="in x.safetensors and in y.safetensors; allowed: each tensor once"):
        encoder.load(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match="2 .safetensors files and no index"):
        encoder.load(tmp_path)


def test_configurations(tmp_path):
    """Shapes decide what they can; the rest from the argument, then metadata, then config.json, then Qwen3.5's."""
    path = tmp_path / "x.safetensors"

    def metadata(**values):
        return {"config": json.dumps(values)}

    tiny_encoder.save(path, with_tokenizer=False)
    assert encoder.load(path).config == CONFIG  # 16 key channels and value heads of 8: two key heads
    four = encoder.load(path, config={"linear_num_key_heads": 4}).config
    assert (four.linear_num_key_heads, four.linear_key_head_dim) == (4, 4)
    tiny_encoder.save(path, with_tokenizer=False, metadata=metadata(linear_key_head_dim=16, rope_theta=3e4))
    loaded = encoder.load(path, config={"rope_theta": 2e4}).config
    assert (loaded.linear_num_key_heads, loaded.rope_theta, loaded.rms_norm_eps) == (1, 2e4, 1e-6)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", "rms_norm_eps": 1e-5}))
    loaded = encoder.load(path).config
    assert (loaded.rope_theta, loaded.rms_norm_eps) == (3e4, 1e-5)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 7}))
    with pytest.warns(UserWarning, match="model type 'llama', not qwen3_5: not used"):
        assert encoder.load(path).config.rms_norm_eps == 1e-6
    (tmp_path / "config.json").unlink()
    for values, message in (
        (dict(hidden_size=64), "metadata: hidden_size: got 64; allowed: 32, as the tensors"),
        (dict(num_hidden_layers=32), "metadata: num_hidden_layers: got 32; allowed: 5"),
        (dict(linear_num_key_heads=3), "key heads"),
        (dict(linear_num_key_heads="two"), "metadata: linear_num_key_heads: got str; allowed: a number"),
        (dict(linear_num_key_heads=2.5), "metadata: linear_num_key_heads: got 2.5"),
        (dict(rope_theta=-1), "metadata: rope_theta: got -1; allowed: a number above 0"),
        (dict(partial_rotary_factor=1.5), "partial_rotary_factor: got 1.5; allowed: a share of head_dim 16"),
        (dict(layer_types=["mamba"] * 5), "metadata: layer_types"),
        (dict(hidden_act="gelu"), "metadata: hidden_act: got 'gelu'; allowed: 'silu'"),
        (dict(rope_parameters={"rope_type": "yarn"}), "metadata: rope_type: got 'yarn'"),
    ):
        tiny_encoder.save(path, with_tokenizer=False, metadata=metadata(**values))
        with pytest.raises((ValueError, TypeError), match=message):
            encoder.load(path)
    for text, message in (("{", "metadata: got what is not JSON"), ("[1]", "metadata: got list")):
        tiny_encoder.save(path, with_tokenizer=False, metadata={"config": text})
        with pytest.raises((ValueError, TypeError), match=message):
            encoder.load(path)
    with pytest.raises(TypeError, match="config: got str"):
        encoder.load(path, config="4b")


def test_bad_arguments(file):
    for arguments, message in (
        (dict(recurrence="rwkv"), "recurrence: got 'rwkv'; allowed: 'gdn' | 'mamba2'"),
        (dict(head_norm="plain"), "head_norm: got 'plain'; allowed: 'exp' | 'one_plus'"),
        (dict(dtype=torch.float64), "dtype: got torch.float64"),
        (dict(alignment_strength=2), "alignment_strength|strength"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.load(file, **arguments)
    loaded = encoder.load(file)
    for ids in ([[]], [[320]], [[-1, 3]]):
        with pytest.raises(ValueError, match="ids: got .*; allowed: at least one, each from 0 to 319"):
            loaded.encode_ids(ids)
    with pytest.raises(TypeError, match="prompts: got int; allowed: text"):
        loaded.encode(["a", 3])


def test_hash_and_info(tmp_path, file):
    first = read_checkpoint(file)
    assert first.hash == encoder.load(file, "mamba2").hash
    other = tiny_encoder.save(tmp_path / "x.safetensors", with_tokenizer=False)
    assert read_checkpoint(other).hash == first.hash
    rewrite(other, lambda t: t["norm.3.bias"].add_(1))
    assert read_checkpoint(other).hash != first.hash
    info = encoder.load(file).info()
    assert json.loads(json.dumps(info)) == info
    assert info["tensors"] == len(CONFIG.shapes()) and info["stored_bytes"] == {"float32": 4 * info["parameters"]}


# prompts and batches


def test_encode(file):
    loaded = encoder.load(file)
    prompts = ["a red cat on the left", "", "a blue house, " * 12, "cat"]
    states, mask = loaded.encode(prompts)
    assert states.shape == (4, mask.shape[1], 24) and states.dtype == torch.float32
    assert not states[~mask].any()
    for i, prompt in enumerate(prompts):
        alone, whole = loaded.encode(prompt)
        assert whole.all() and alone.shape[1] == mask[i].sum()
        assert (states[i, : alone.shape[1]] - alone[0]).abs().max() < TOLERANCE
    assert loaded.tokenize("") == [loaded.tokenizer.get_vocab()["<|endoftext|>"]]
    one_by_one, _ = loaded.encode(prompts, batch_tokens=1)
    assert (one_by_one - states).abs().max() < TOLERANCE
    empty, mask = loaded.encode([])
    assert empty.shape == (0, 0, 24) and mask.shape == (0, 0)


def test_adjustment_follows_the_head(file):
    alignment = encoder.Alignment(torch.eye(24).roll(1, 0), torch.randn(24), torch.randn(24))
    loaded = encoder.load(file, alignment=alignment, alignment_strength=0.25, output_scale=2.0)
    raw, mask = loaded.raw(["a red cat", "cat"])
    states, _ = loaded.encode(["a red cat", "cat"])
    expected = (raw - alignment.source_mean) @ alignment.rotation.T
    expected = 2 * (expected + 0.75 * alignment.source_mean + 0.25 * alignment.target_mean)
    assert torch.allclose(states[mask], expected[mask], atol=1e-5) and not states[~mask].any()


def test_prompt_weights(file):
    for prompt, expected in (
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("((x))", [("x", 1.1 * 1.1)]),
        ("(a (b:0.5) c)", [("a ", 1.1), ("b", 0.5), (" c", 1.1)]),
        (r"cat \(animal\)", [("cat (animal)", 1.0)]),
        (r"(cat \(animal\):1.2)", [("cat (animal)", 1.2)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("()", []),
        ("", []),
        ("(a", [("(a", 1.0)]),
        ("a) (b) c", [("a) (b) c", 1.0)]),
        ("(a)(b:2)", [("a", 1.1), ("b", 2.0)]),
    ):
        found = pieces(prompt)
        assert [text for text, _ in found] == [text for text, _ in expected], prompt
        assert [w for _, w in found] == pytest.approx([w for _, w in expected]), prompt
    loaded = encoder.load(file)
    assert loaded.tokenize("a (red:1.3)") == loaded.tokenize("a ") + loaded.tokenize("red")
    assert loaded.tokenize("(red:1.3)", weights=False) == loaded.tokenizer("(red:1.3)")["input_ids"]


def test_batches():
    lengths = [5, 1, 9, 5, 5, 300]
    found = list(batches(lengths, 12))
    assert sorted(i for batch in found for i in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 12 for b in found)
    assert found[-1] == [5]


# tokenizers


class Vocabulary:
    def __init__(self, **ids):
        self.ids = {f"<|{name}|>": i for name, i in ids.items()}

    def get_vocab(self):
        return self.ids


def test_tokenizer_checks():
    check_tokenizer(Vocabulary(endoftext=248044, im_start=248045, im_end=248046, audio=248076), 248320, "x")
    for vocabulary, rows, message in (
        (Vocabulary(endoftext=151643, im_start=151644), 248320, "a Qwen3 .*tokenizer: <|endoftext|> is 151643, a word"),
        (Vocabulary(endoftext=5, im_end=151645), 248320, "a Qwen3"),
        (Vocabulary(pad=0), 248320, "without <|endoftext|>"),
        (Vocabulary(endoftext=248044, im_end=7), 248320, "'<|im_end|>': 7"),
        (Vocabulary(endoftext=0, last=320), 320, "id 320; allowed: ids below 320"),
    ):
        with pytest.raises(ValueError, match=message.replace("|", r"\|")) as caught:
            check_tokenizer(vocabulary, rows, "x")
        assert str(caught.value).startswith("tokenizer: got x")


def test_tokenizer_places(tmp_path, file, monkeypatch):
    data = (file.parent / "tokenizer.json").read_text()
    path = tiny_encoder.save(tmp_path / "x.safetensors", with_tokenizer=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="Put the tokenizer.json of Qwen/Qwen3.5-4B into .*name the directory"):
        encoder.load(path).encode("a cat")
    with pytest.raises(FileNotFoundError, match="tokenizer: no tokenizer.json"):
        encoder.load(path, tokenizer=tmp_path / "nowhere")
    expected = encoder.load(file).tokenize("a red cat")
    for place in (tmp_path / "x", tmp_path / "tokenizer"):
        place.mkdir()
        (place / "tokenizer.json").write_text(data)
        assert encoder.load(path).tokenize("a red cat") == expected
        (place / "tokenizer.json").unlink()
    for tokenizer in (file.parent, file.parent / "tokenizer.json", tiny_encoder.tokenizer()):
        assert encoder.load(path, tokenizer=tokenizer).tokenize("a red cat") == expected
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="which cannot be read .*; allowed: a tokenizer.json"):
        encoder.load(path).tokenize("a")


# random damage

JUNK = [None, True, -1, 0, 2**63, 1e30, "x", [], {}, [[]], "F32", "BF16", "BOOL", "C64", "I64", "U8"]
NAMES = ["", "../x", "layers.3.", "layers.-1.a", "layers.00.x", "norm.", "model.", "__metadata__", "\0"]
CONFIGS = ["{", "[]", "null", '{"text_config": 3}', '{"rope_parameters": 7}', '{"layer_types": [["linear_attention"]]}']
CONFIGS += ['{"rms_norm_eps": NaN}', '{"rope_theta": Infinity}', '{"linear_num_key_heads": 1e300}', '{"head_size": 0}']


def damaged(header, rng):
    """Up to three entries of a header changed, renamed or dropped."""
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(header))
        kind = rng.choice(["entry", "dtype", "shape", "data_offsets", "rename", "config", "drop"])
        if kind == "rename":
            header[rng.choice(NAMES)] = header.pop(name)
        elif kind == "config":
            header["__metadata__"] = {"config": rng.choice(CONFIGS)}
        elif kind == "drop":
            header.pop(name)
        elif kind == "entry" or not isinstance(header[name], dict):
            header[name] = rng.choice(JUNK)
        else:
            header[name][kind] = rng.choice([*JUNK, [2**40, 2**40], [-1, 32], [5, 5], [0, 2**62]])
    return header


def test_random_damage(tmp_path):
    """Whatever a header says, the file loads or a ValueError or TypeError says what was wrong with what."""
    data = tiny_encoder.save(tmp_path / "x.safetensors", with_tokenizer=False).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    for _ in range(300):
        header = json.dumps(damaged(json.loads(data[8 : 8 + length]), rng)).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        try:
            read_checkpoint(tmp_path / "x.safetensors")
        except (ValueError, TypeError) as error:
            assert "got " in str(error) and "allowed: " in str(error), header


def test_progress(file, capsys):
    encoder.load(file, progress=True)
    assert "tiny.safetensors: 100%" in capsys.readouterr().err
    encoder.load(file)  # not a terminal
    assert not capsys.readouterr().err
