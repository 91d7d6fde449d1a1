"""`anima-fast generate --encoder`: the hybrid encoder in a tiny random Anima of diffusers, and in the PNG's record."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers >= 0.42: pip install 'anima-fast[diffusers]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'anima-fast[diffusers]'")
pytest.importorskip("accelerate", reason="needs accelerate: diffusers loads Anima's transformer with it")

import numpy as np
import tiny_encoder
import tiny_pipeline
from PIL import Image
from test_cli import refused, run

from anima_fast import encoder as encoders
from anima_fast.runner.encoder import replacements
from anima_fast.runner.request import read_record

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32  # of the tiny pipeline's text conditioner
PROMPT = ["--prompt", "a (red) cat", "--negative", "the sea", "--size", "96x64", "--steps", "2", "--seed", "5"]
REGION = ["--region", "left.png=a blue house"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    tiny_pipeline.save(folder / "model")
    for name, width, seed in (("qwen35", WIDTH, 0), ("other", WIDTH, 1), ("narrow", 24, 0)):
        (folder / name).mkdir()
        config = dataclasses.replace(tiny_encoder.CONFIG, head_size=width)
        tiny_encoder.save(folder / name / "qwen35.safetensors", config, seed=seed)
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (0, 0, 50, 64))
    mask.save(folder / "left.png")
    encoder = encoders.load(folder / "qwen35" / "qwen35.safetensors")
    prompts = [f"{a} {b}" for a in ("red", "blue", "the", "a") for b in ("cat", "house", "sea", "girl", "left", "side")]
    states, mask = encoder.raw(prompts)
    torch.manual_seed(0)
    source = states[mask]
    with pytest.warns(UserWarning, match="directions"):
        alignment = encoders.Alignment.fit(
            source[:25], torch.randn(25, WIDTH) + 2, origin=dataclasses.replace(ORIGIN, encoder=encoder.hash)
        )
    alignment.save(folder / "alignment.safetensors")
    calibration = encoders.Calibration.fit(source, 3 * torch.randn(99, WIDTH), alignment=alignment, origin=ORIGIN)
    calibration.save(folder / "calibration.safetensors")
    return folder


ORIGIN = encoders.alignment.Origin("gdn", "exp")
ENC = ["--encoder", "qwen35/qwen35.safetensors"]
ADJUSTED = ["--alignment", "alignment.safetensors", "--calibration", "calibration.safetensors", "--output-scale", "1.5"]


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)
    return files


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def generate(capsys, *options, out):
    code, text, err = run(capsys, "generate", *options, "--device", "cpu", "--out", out)
    assert (code, err) == (0, ""), err
    return text


def test_it_drives_the_pipeline_and_is_repeated(here, capsys):
    generate(capsys, "--model", "model", *PROMPT, *REGION, out="stock.png")
    generate(capsys, "--model", "model", *PROMPT, *REGION, *ENC, out="a.png")
    assert (pixels("stock.png") != pixels("a.png")).any()
    generate(capsys, "--like", "a.png", out="b.png")
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    record = read_record("a.png").encoder
    assert record.file == ENC[1] and record.sums == {ENC[1]: encoders.load(ENC[1]).hash[:16]}
    generate(capsys, "--like", "a.png", "--encoder", "stock", out="c.png")
    assert (pixels("stock.png") == pixels("c.png")).all() and read_record("c.png").encoder is None


CHANGES = {
    "recurrence": ["--recurrence", "mamba2"],
    "head norm": ["--head-norm", "one_plus"],
    "alignment": ["--alignment", "alignment.safetensors"],
    "strength": ["--alignment", "alignment.safetensors", "--alignment-strength", "1"],
    "calibration": ADJUSTED[:4],
    "scale": ["--output-scale", "2"],
    "another": ["--encoder", "other/qwen35.safetensors"],
}


def test_every_setting_is_what_the_library_gives(here, capsys):
    """The states that reach the text conditioner, setting by setting; the sea is the negative prompt."""
    seen = []
    for name, change in CHANGES.items():
        generate(capsys, "--model", "model", *PROMPT, *ENC, *change, out="x.png")
        generate(capsys, "--like", "x.png", out="y.png")
        assert (here / "x.png").read_bytes() == (here / "y.png").read_bytes(), name
        choice = read_record("x.png").encoder
        encoder, again = choice.load(device="cpu", dtype=torch.float32)
        assert again == choice
        parts = replacements(encoder, torch.float32)
        batch = parts["tokenizer"](["a (red) cat", ""], max_length=512, padding="longest", truncation=True)
        states = parts["text_encoder"](input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        expected, mask = encoder.encode(["a (red) cat", ""], weights=False)
        torch.testing.assert_close(states, expected, atol=0, rtol=0)
        assert torch.equal(mask.long(), batch.attention_mask) and mask[1].sum() == 1
        pipe = tiny_pipeline.build()
        pipe.update_components(**parts)
        image = pipe(
            prompt="a (red) cat", negative_prompt="the sea", width=96, height=64, num_inference_steps=2,
            generator=torch.Generator().manual_seed(5), output="images",
        )[0]  # fmt: skip
        capsys.readouterr()  # its progress bar
        difference = np.abs(np.array(image).astype(int) - pixels("x.png"))
        assert difference.max() <= 1, name  # cross-attention is not diffusers' there, and rounds otherwise
        seen.append((name, expected))
    for (one, a), (other, b) in itertools.pairwise(seen):
        assert (a - b).abs().max() > 1e-5, (one, other)


def test_like_with_changes(here, capsys):
    generate(capsys, "--model", "model", *PROMPT, *ENC, *ADJUSTED, out="a.png")
    generate(capsys, "--like", "a.png", "--alignment-strength", "1", out="b.png")
    was, now = read_record("a.png").encoder, read_record("b.png").encoder
    assert dataclasses.replace(now, alignment_strength=0.5) == was and len(was.sums) == 3
    (here / "alignment.safetensors").rename(here / "kept")
    try:
        changed = encoders.Alignment.load(here / "kept")
        dataclasses.replace(changed, report=None).save(here / "alignment.safetensors")
        code, text, err = run(capsys, "generate", "--like", "a.png", "--out", "c.png", "--device", "cpu", "--json")
        assert code == 0 and "'alignment.safetensors' is not the file that the picture was made with" in err + text
        assert json.loads(text)["encoder"]["output_scale"] == 1.5
    finally:
        (here / "kept").replace(here / "alignment.safetensors")


def test_what_is_refused(here, capsys):
    for options, message in (
        (["--alignment", "alignment.safetensors"], "--alignment: got no --encoder"),
        (["--encoder", "stock", "--recurrence", "gdn"], "--encoder: got 'stock' with --recurrence"),
        (["--encoder", "nowhere.safetensors"], "nowhere.safetensors"),
        ([*ENC, "--alignment-strength", "3"], "alignment_strength: got 3.0"),
        ([*ENC, *ADJUSTED, "--recurrence", "mamba2"], "fitted to recurrence='gdn', but the encoder runs 'mamba2'"),
        (["--encoder", "narrow/qwen35.safetensors"], "--encoder: got an encoder of 24 dimensions; allowed: 32"),
        ([*ENC, "--encoder-tokenizer", "model"], "tokenizer: "),
    ):
        assert message in refused(capsys, "generate", "--model", "model", *PROMPT, *options, "--out", "x9.png")
        assert not (here / "x9.png").exists()
