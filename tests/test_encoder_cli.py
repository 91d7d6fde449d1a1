"""`anima-fast encoder` on a tiny encoder and a tiny target: from prompts to files, tables and pictures; and the
diagnostics and the target's loader behind it."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import refused, run

from anima_fast.encoder.diagnostics import Diagnostics, pool, rows_of_table
from anima_fast.encoder.head import ExpRMSNorm
from anima_fast.encoder.prompt_file import read_prompts

pytest.importorskip("transformers", "5.0", reason="needs transformers: pip install 'anima-fast[transformers]'")

import tiny_encoder
import tiny_target

from anima_fast import encoder as encoders
from anima_fast.encoder.target import load_target

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("red", "blue", "old", "small"), ("cat", "house", "sea", "girl"), ("on the left", "from behind", "at night")
PROMPTS = [" ".join(words) for words in itertools.product(*WORDS)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Everything the commands read, in one directory that they also write to."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "enc").mkdir()
    (folder / "stock").mkdir()
    tiny_encoder.save(folder / "enc" / "qwen35.safetensors")
    tiny_target.save_file_form(folder / "stock" / "qwen3.safetensors")
    rows = [f"{('spatial', 'environment')[i % 2]}\t{prompt}" for i, prompt in enumerate(PROMPTS)]
    (folder / "prompts.tsv").write_text("category\tprompt\n" + "\n".join(rows) + "\n")
    (folder / "few.txt").write_text("a red cat\n\nthe sea, from the side\na red cat\n")
    return folder


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)
    return files


ENC, STOCK = "enc/qwen35.safetensors", "stock/qwen3.safetensors"
FIT = ["--target", STOCK, "--prompts", "prompts.tsv"]


@pytest.fixture
def fitted(here, capsys):
    """An alignment and a calibration of the gdn reading, made by the commands."""
    if not (here / "alignment.safetensors").exists():
        run(capsys, "encoder", "fit-alignment", ENC, *FIT, "--out", "alignment.safetensors")
        run(
            capsys, "encoder", "fit-calibration", ENC, *FIT, "--alignment", "alignment.safetensors", "--out",
            "calibration.safetensors",
        )  # fmt: skip
    return ["--alignment", "alignment.safetensors", "--calibration", "calibration.safetensors"]


def shortest_side(picture):
    with Image.open(picture) as image:
        return min(image.size)


# -------------------------------------------------------------------------------------------------- diagnostics


def by_definition(prompts):
    """The figures of docs/encoder.md from a list of `[L, D]`, pair by pair."""
    tokens = torch.cat(prompts)
    diversity = []
    for rows in prompts:
        pairs = [1 - torch.cosine_similarity(a, b, dim=0) for a, b in itertools.permutations(rows, 2)]
        if pairs:
            diversity.append(float(sum(pairs)) / len(pairs))
    pooled = [rows.mean(dim=0) for rows in prompts]
    similar = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(pooled, 2)]
    return {
        "mean": float(tokens.mean()),
        "std": float(tokens.std(correction=0)),
        "l2_per_token": float(tokens.norm(dim=1).mean()),
        "token_diversity": sum(diversity) / len(diversity),
        "cross_prompt_similarity": sum(similar) / len(similar),
    }


def padded(prompts, fill):
    longest = max(map(len, prompts))
    states = torch.full((len(prompts), longest, prompts[0].shape[1]), fill, dtype=prompts[0].dtype)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for i, rows in enumerate(prompts):
        states[i, : len(rows)], mask[i, : len(rows)] = rows, True
    return states, mask


@pytest.mark.parametrize("fill", [0.0, 1e9, math.nan], ids=["zeros", "large", "nan"])
def test_diagnostics_are_what_the_definitions_say(fill):
    prompts = [torch.randn(length, 6, dtype=torch.float64) * 3 + 1 for length in (1, 2, 5, 9, 3)]
    found = Diagnostics(6)
    for part in (prompts[:2], prompts[2:]):
        found.add(*padded(part, fill))
    result = found.result()
    assert (result["prompts"], result["tokens"]) == (5, 20)
    for name, value in by_definition(prompts).items():
        assert result[name] == pytest.approx(value, rel=1e-9), name
    expected = torch.cat(prompts).std(dim=0, correction=0)
    torch.testing.assert_close(torch.tensor(result["std_per_dimension"], dtype=torch.float64), expected)
    torch.testing.assert_close(pool(*padded(prompts, 0.0)), torch.stack([rows.mean(dim=0) for rows in prompts]))


def test_diagnostics_of_little():
    found = Diagnostics(3)
    with pytest.raises(ValueError, match="prompts: got no tokens"):
        found.result()
    found.add(torch.ones(1, 1, 3), torch.ones(1, 1, dtype=torch.bool))
    result = found.result()
    assert result["token_diversity"] is None and result["cross_prompt_similarity"] is None
    assert "-" in rows_of_table({"one": result})[4]
    with pytest.raises(ValueError, match="states: got values that are not finite"):
        found.add(torch.full((1, 2, 3), math.nan), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="states, mask: got shapes"):
        found.add(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    same = Diagnostics(3)
    same.add(torch.ones(4, 5, 3), torch.ones(4, 5, dtype=torch.bool))
    assert same.result()["token_diversity"] == pytest.approx(0, abs=1e-12)
    assert same.result()["cross_prompt_similarity"] == pytest.approx(1)


def test_the_published_collapse(capsys):
    """A head at its real size, its norm's weights around −0.003: as a plain factor they leave the last bias alone, and
    every token and every prompt is the same. exp(w) and 1 + w do not collapse. Published: 0.003 and 0.999, against
    0.821 and 0.689."""
    torch.manual_seed(0)
    width, out = 2560, 1024
    first, last = torch.randn(out, width) * width**-0.5, torch.randn(out, out) * out**-0.5
    first_bias, last_bias = 0.05 * torch.randn(out), 0.05 * torch.randn(out)
    weight = -0.003 + 0.003 * torch.randn(out)
    shared = torch.randn(width)
    norms = {"plain": None, "exp": ExpRMSNorm(out, "exp"), "one_plus": ExpRMSNorm(out, "one_plus")}
    found = {}
    for name, norm in norms.items():
        diagnostics = Diagnostics(out)
        for prompt in range(8):
            torch.manual_seed(prompt)
            x = 0.7 * shared + 0.6 * torch.randn(width) + torch.randn(20, width)
            h = x @ first.T + first_bias
            if norm is None:
                h = weight * h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-6)
            else:
                norm.weight.data = weight
                h = norm(h)
            states = torch.nn.functional.silu(h) @ last.T + last_bias
            diagnostics.add(states[None], torch.ones(1, 20, dtype=torch.bool))
        found[name] = diagnostics.result()
    assert found["plain"]["token_diversity"] < 0.01 and found["plain"]["cross_prompt_similarity"] > 0.99
    for name in ("exp", "one_plus"):
        assert found[name]["token_diversity"] > 0.3 and found[name]["cross_prompt_similarity"] < 0.9
        assert found[name]["std"] > 5 * found["plain"]["std"]
        assert found[name]["l2_per_token"] > 5 * found["plain"]["l2_per_token"]
    for row in rows_of_table(found):
        print("".join(cell.rjust(28 if i == 0 else 12) for i, cell in enumerate(row)))


# ------------------------------------------------------------------------------------------------------ prompts


def test_prompt_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\ufeff a red cat \n\nthe sea\na red cat\n", encoding="utf-8")
    assert read_prompts(file).texts == ("a red cat", "the sea") and read_prompts(file).repeated == 1
    assert read_prompts(file).categories is None
    table = tmp_path / "p.csv"
    table.write_text('id,prompt,category\n1,"a cat, sitting",pose\n2,the sea,\n3,"a cat, sitting",meta\n')
    found = read_prompts(table)
    assert found.texts == ("a cat, sitting", "the sea") and found.categories == ("pose", "")
    table.write_text("prompt\ncat\n")
    assert read_prompts(table).categories is None
    table.write_text("text,kind\ncat,a\n")
    with pytest.raises(ValueError, match="with the columns 'text', 'kind'; allowed: a column prompt"):
        read_prompts(table)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="without a prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="bytes that are not UTF-8"):
        read_prompts(file)
    with pytest.raises(FileNotFoundError, match="prompts: no file"):
        read_prompts(tmp_path / "none.txt")


# ------------------------------------------------------------------------------------------------------- target


def test_the_target_from_a_file_and_from_a_directory(tmp_path):
    (tmp_path / "file").mkdir()
    tiny_target.save_file_form(tmp_path / "file" / "qwen3.safetensors")
    tiny_target.save_directory(tmp_path / "directory")
    a, b = load_target(tmp_path / "file" / "qwen3.safetensors"), load_target(tmp_path / "directory")
    assert a.hash == b.hash and a.width == 24
    states, mask = a.encode(["a red cat", "", "the sea at night"])
    torch.testing.assert_close(states, b.encode(["a red cat", "", "the sea at night"])[0], atol=1e-6, rtol=1e-6)
    assert mask.sum(dim=1).tolist() == [9, 1, 16] and states.shape == (3, 16, 24)
    assert (states[~mask] == 0).all()
    reference = tiny_target.model()
    for i, prompt in enumerate(["a red cat", "the sea at night"]):  # and padding changes nothing
        ids = torch.tensor([tiny_target.tokenizer()(prompt).input_ids])
        row = (0, 2)[i]
        torch.testing.assert_close(
            states[row][mask[row]], reference(input_ids=ids).last_hidden_state[0], atol=1e-5, rtol=1e-5
        )
    plain, _ = a.encode(["red cat"])
    weighted, _ = a.encode(["(red:1.3) cat"])
    assert weighted.shape == plain.shape  # as ComfyUI: weights are no text
    small = a.encode(["a red cat", "the sea at night", ""], batch_tokens=1)[0]
    torch.testing.assert_close(small[1], states[2], atol=1e-5, rtol=1e-5)
    bare = tiny_target.save_file_form(tmp_path / "file" / "bare.safetensors", prefix="")
    assert load_target(bare).hash == a.hash


def test_the_tokenizer_of_the_comfyui_around_it(tmp_path):
    weights = tmp_path / "models" / "text_encoders"
    weights.mkdir(parents=True)
    file = tiny_target.save_file_form(weights / "qwen3.safetensors", with_tokenizer=False)
    inside = tmp_path / "comfy" / "text_encoders" / "qwen25_tokenizer"
    tiny_target.tokenizer().save_pretrained(inside)
    assert load_target(file).encode(["cat"])[1].sum() == 3


TARGET_FILES = {
    "missing": ({"model.norm.weight": None}, "norm.weight missing"),
    "extra": ({"model.more": torch.zeros(2)}, "more unknown"),
    "shape": ({"model.norm.weight": torch.zeros(23)}, "norm.weight of shape [23] and not [24]"),
    "nan": ({"model.norm.weight": torch.full((24,), math.nan)}, "norm.weight not finite"),
    "integers": ({"model.norm.weight": torch.zeros(24, dtype=torch.int32)}, "norm.weight of torch.int32"),
    "no embeddings": ({"model.embed_tokens.weight": None}, "without embed_tokens.weight"),
    "encoder": ({"model.layers.0.linear_attn.A_log": torch.zeros(2)}, "a Qwen3.5: that is the encoder's side"),
}


@pytest.mark.parametrize(("change", "message"), TARGET_FILES.values(), ids=TARGET_FILES)
def test_wrong_target_files(tmp_path, change, message):
    file = tiny_target.save_file_form(tmp_path / "qwen3.safetensors", change=change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_target(file)
    assert str(caught.value).startswith("target: got")


def test_wrong_targets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="target: no file or directory"):
        load_target(tmp_path / "none")
    with pytest.raises(ValueError, match=re.escape("without config.json")):
        load_target(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x80\x02}")
    with pytest.raises(ValueError, match="which cannot be read"):
        load_target(tmp_path / "cut.safetensors")
    (tmp_path / "a").mkdir()
    file = tiny_target.save_file_form(tmp_path / "a" / "qwen3.safetensors", with_tokenizer=False)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json or vocab.json in .*put there tokenizer_config.json"):
        load_target(file, tokenizer=tmp_path)
    big = tiny_target.tokenizer()
    big.add_tokens([f"<more{i}>" for i in range(60)])
    big.save_pretrained(tmp_path / "c")
    with pytest.raises(ValueError, match="with 317 ids for 300 rows of embeddings"):
        load_target(file, tokenizer=tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="a llama; allowed: a qwen3"):
        load_target(tmp_path / "d")


# ----------------------------------------------------------------------------------------------------- commands


def test_fit_alignment(here, capsys):
    out = "one.safetensors"
    code, text, _ = run(capsys, "encoder", "fit-alignment", ENC, *FIT, "--out", out, "--plot", "one.png")
    assert code in (0, 1) and text.startswith("of gdn, head norm exp, encoder ")
    for phrase in ("held-out prompts", "the mean alone", "centred after", "spatial (", "environment (", "R2 of these"):
        assert phrase in text
    assert shortest_side("one.png") > 400
    report = json.loads(run(capsys, "encoder", "fit-alignment", ENC, *FIT, "--out", out, "--json")[1])
    fit = report["fit"]
    assert fit["prompts"] == 48 and fit["fitted"] + fit["held_out"] == 48 and report["repeated_prompts"] == 0
    assert -1 <= fit["centred_after"]["mean"] <= 1 and fit["of_mean"]["mean"] > 0
    assert report["origin"]["recurrence"] == "gdn" and report["origin"]["encoder"] == encoders.load(ENC).hash
    # it is what the library gives
    enc, target = encoders.load(ENC), load_target(STOCK)
    ordered = sorted(PROMPTS, key=len)
    categories = [("spatial", "environment")[PROMPTS.index(p) % 2] for p in ordered]
    direct = encoders.Alignment.fit(pool(*enc.raw(ordered)), pool(*target.encode(ordered)), categories=categories)
    torch.testing.assert_close(encoders.Alignment.load(out).rotation, direct.rotation, atol=1e-4, rtol=0)
    assert fit["centred_after"]["mean"] == pytest.approx(direct.report["centred_after"]["mean"], abs=1e-4)
    code, text, _ = run(
        capsys, "encoder", "fit-alignment", ENC, *FIT, "--no-reflections", "--held-out", 0, "--out", out
    )
    assert encoders.Alignment.load(out).determinant == 1 and "no prompt was held out" in text and code == 0


def test_an_alignment_that_found_nothing_is_a_problem(here, capsys, monkeypatch):
    torch.manual_seed(3)
    noise = {prompt: torch.randn(1, 24) for prompt in PROMPTS}

    def unrelated(self, prompts):
        return torch.stack([noise[p] for p in prompts]) + 3, torch.ones(len(prompts), 1, dtype=torch.bool)

    monkeypatch.setattr("anima_fast.encoder.target.Target.encode", unrelated)
    code, _, err = run(capsys, "encoder", "fit-alignment", ENC, *FIT, "--out", "noise.safetensors")
    assert code == 1 and "next to nothing that both encoders share" in err


def test_fit_calibration(here, capsys, fitted):
    report = json.loads(
        run(capsys, "encoder", "fit-calibration", ENC, *FIT, *fitted[:2], "--out", "c.safetensors", "--json")[1]
    )
    assert report["fit"]["source_tokens"] > 48 and report["fit"]["scale_rotated"]["max"] > 0
    enc, target = encoders.load(ENC, alignment=fitted[1], calibration="c.safetensors"), load_target(STOCK)
    states, mask = enc.encode(PROMPTS)
    goal, real = target.encode(PROMPTS)
    torch.testing.assert_close(states[mask].mean(dim=0), goal[real].mean(dim=0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        states[mask].std(dim=0, correction=0), goal[real].std(dim=0, correction=0), atol=1e-3, rtol=1e-3
    )
    code, text, err = run(capsys, "encoder", "fit-calibration", ENC, *FIT, "--out", "plain.safetensors")
    assert code == 0 and "scale after the alignment" not in text and err == ""


def test_inspect(here, capsys, fitted):
    code, text, err = run(capsys, "encoder", "inspect", ENC)
    assert (code, err) == (0, "") and "5 layers, 3 of them recurrent" in text and "exp(w) and 1 + w differ" in text
    report = json.loads(run(capsys, "encoder", "inspect", ENC, "--json")[1])
    assert report["kind"] == "encoder" and report["hash"] == encoders.load(ENC).hash and report["warnings"] == []
    for file, kind in ((fitted[1], "alignment"), (fitted[3], "calibration")):
        code, text, _ = run(capsys, "encoder", "inspect", file)
        assert code == 0 and f"a{'n' if kind == 'alignment' else ''} {kind} of 24 dimensions" in text
        report = json.loads(run(capsys, "encoder", "inspect", file, "--json")[1])
        assert report["kind"] == kind and report["origin"]["recurrence"] == "gdn" and report["origin"]["prompts"] == 48
    save_file(load_file(fitted[1]), "foreign.safetensors")
    code, text, err = run(capsys, "encoder", "inspect", "foreign.safetensors")
    assert code == 0 and "not known of which encoder" in text and "does not say which recurrence" in err


def test_encode(here, capsys, fitted):
    common = ["encoder", "encode", ENC, "--prompts", "few.txt", "--out", "states.safetensors"]
    code, text, err = run(capsys, *common)
    assert (code, err) == (0, "") and "a red cat" in text and "states 2 x" in text
    enc = encoders.load(ENC)
    states, mask = enc.encode(["a red cat", "the sea, from the side"])
    found = load_file("states.safetensors")
    torch.testing.assert_close(found["states"], states, atol=0, rtol=0)
    assert torch.equal(found["mask"], mask)
    with safe_open("states.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["prompts"]) == ["a red cat", "the sea, from the side"]
    run(capsys, *common, *fitted, "--alignment-strength", 0.3, "--output-scale", 2)
    adjusted = encoders.load(ENC, alignment=fitted[1], alignment_strength=0.3, calibration=fitted[3], output_scale=2.0)
    torch.testing.assert_close(
        load_file("states.safetensors")["states"], adjusted.encode(["a red cat", "the sea, from the side"])[0]
    )
    run(capsys, *common, "--recurrence", "mamba2", "--head-norm", "one_plus")
    other = encoders.load(ENC, "mamba2", "one_plus").encode(["a red cat", "the sea, from the side"])[0]
    torch.testing.assert_close(load_file("states.safetensors")["states"], other)
    assert (states - other).abs().max() > 1e-3


def test_report(here, capsys, fitted):
    common = ["encoder", "report", ENC, "--prompts", "prompts.tsv"]
    code, text, err = run(capsys, *common, *fitted, "--target", STOCK, "--plot", "report.png")
    assert (code, err) == (0, ""), err
    header = text.splitlines()[1].split("  ")
    assert [cell.strip() for cell in header if cell.strip()] == [
        "gdn raw", "gdn aligned", "gdn calibrated", "mamba2 raw", "target",
    ]  # fmt: skip
    for phrase in ("token diversity", "cross-prompt similarity", "L2 per token", "per-dimension scale, max", "centred"):
        assert phrase in text
    assert shortest_side("report.png") > 400
    report = json.loads(run(capsys, *common, *fitted, "--target", STOCK, "--json")[1])
    results = report["results"]
    enc = encoders.load(ENC)
    direct = Diagnostics(24)
    direct.add(*enc.raw(PROMPTS))
    for key in ("mean", "std", "l2_per_token", "token_diversity", "cross_prompt_similarity"):
        assert results["gdn raw"][key] == pytest.approx(direct.result()[key], abs=1e-6)
    assert results["gdn calibrated"]["std"] == pytest.approx(results["target"]["std"], rel=1e-2)
    assert results["gdn raw"]["token_diversity"] != results["mamba2 raw"]["token_diversity"]
    code, text, _ = run(capsys, *common, "--recurrence", "gdn")
    assert "mamba2" not in text and "per-dimension std, max" in text


def test_report_with_a_file_for_each_recurrence(here, capsys, fitted):
    other = ["--recurrence", "mamba2", "--out", "mamba2.safetensors"]
    assert run(capsys, "encoder", "fit-alignment", ENC, *FIT, *other)[0] in (0, 1)
    both = ["--alignment", "mamba2.safetensors", "alignment.safetensors"]
    code, text, _ = run(capsys, "encoder", "report", ENC, "--prompts", "few.txt", *both, "--json")
    assert code == 0 and list(json.loads(text)["results"]) == [
        "gdn raw", "gdn aligned", "mamba2 raw", "mamba2 aligned",
    ]  # fmt: skip
    for recurrence, file in (("gdn", "alignment.safetensors"), ("mamba2", "mamba2.safetensors")):
        direct = Diagnostics(24)
        direct.add(*encoders.load(ENC, recurrence, alignment=file).encode(["a red cat", "the sea, from the side"]))
        found = json.loads(text)["results"][f"{recurrence} aligned"]
        assert found["l2_per_token"] == pytest.approx(direct.result()["l2_per_token"], rel=1e-6)


def test_a_collapsed_encoder_is_a_problem(here, capsys, tmp_path):
    tensors = tiny_encoder.tensors()
    tensors["norm.3.weight"] *= 1e-3
    tensors["norm.3.bias"] += 1
    save_file(tensors, tmp_path / "flat.safetensors")
    tiny_encoder.tokenizer()._tokenizer.save(str(tmp_path / "tokenizer.json"))
    code, _, err = run(capsys, "encoder", "report", tmp_path / "flat.safetensors", "--prompts", "prompts.tsv")
    assert code == 1 and "collapsed: the tokens of a prompt are all alike" in err and "all prompts are alike" in err


def test_sweep(here, capsys, fitted):
    common = ["encoder", "sweep", ENC, "--prompts", "few.txt", "--strengths", 0, 0.5, 1]
    code, text, err = run(capsys, *common, *fitted[:2], "--target", STOCK, "--plot", "s.png", "--out", "s.safetensors")
    assert code == 0 and "1 prompts were there more than once" in err
    header = [cell for cell in text.splitlines()[1].split("  ") if cell.strip()]
    assert [cell.strip() for cell in header] == ["off", "0", "0.5", "1", "target"]
    found = load_file("s.safetensors")
    assert set(found) == {"states_off", "states_0", "states_0.5", "states_1", "mask"}
    enc = encoders.load(ENC, alignment=fitted[1], alignment_strength=0.5)
    torch.testing.assert_close(found["states_0.5"], enc.encode(["a red cat", "the sea, from the side"])[0])
    torch.testing.assert_close(found["states_off"], enc.raw(["a red cat", "the sea, from the side"])[0])
    assert shortest_side("s.png") > 400
    run(capsys, *common, *fitted, "--output-scale", 3)


REFUSED = {
    "no prompts": (["encode", ENC, "--out", "x.safetensors"], "--prompts: got nothing"),
    "both": (["encode", ENC, "--prompt", "a", "--prompts", "few.txt", "--out", "x.safetensors"], "got both"),
    "no encoder": (["inspect", "nowhere.safetensors"], "nowhere.safetensors"),
    "not an encoder": (["inspect", "prompts.tsv"], "prompts.tsv"),
    "out": (["encode", ENC, "--prompt", "a", "--out", "x.pt"], "--out: got 'x.pt'; allowed: a file name that ends in"),
    "out's directory": (["encode", ENC, "--prompt", "a", "--out", "no/x.safetensors"], "--out: the directory"),
    "strength": (["encode", ENC, "--prompt", "a", "--alignment", "alignment.safetensors", "--alignment-strength", "2",
                  "--out", "x.safetensors"], "alignment_strength: got 2.0; allowed: a number from 0 to 1"),
    "recurrence": (["encode", ENC, "--prompt", "a", "--recurrence", "mamba2", "--alignment", "alignment.safetensors",
                    "--out", "x.safetensors"], "fitted to recurrence='gdn', but the encoder runs 'mamba2'"),
    "report's": (["report", ENC, "--prompt", "a", "--recurrence", "mamba2", "--alignment", "alignment.safetensors"],
                 "--alignment: got a file fitted to recurrence='gdn'; allowed: --recurrence mamba2"),
    "two": (["report", ENC, "--prompt", "a", "--alignment", "alignment.safetensors", "alignment.safetensors"],
            "--alignment: got two files for gdn"),
    "kind": (["encode", ENC, "--prompt", "a", "--calibration", "alignment.safetensors", "--out", "x.safetensors"],
             "of format 'anima_fast.Alignment'; allowed: a saved Calibration"),
    "target": (["fit-alignment", ENC, "--prompt", "a", "--target", ENC, "--out", "x.safetensors"], "target: got"),
    "one prompt": (["fit-alignment", ENC, "--prompt", "a", "--target", STOCK, "--out", "x.safetensors"],
                   "source: got 1 prompts to fit"),
    "config": (["inspect", ENC, "--config", "prompts.tsv"], "--config: got 'prompts.tsv', which is no JSON"),
    "device": (["encode", ENC, "--prompt", "a", "--device", "tpu", "--out", "x.safetensors"], "--device: got 'tpu'"),
    "tokenizer": (["encode", ENC, "--prompt", "a", "--tokenizer", "nowhere", "--out", "x.safetensors"], "tokenizer: "),
    "action": (["align", ENC], "invalid choice: 'align'"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_commands_refuse(here, capsys, fitted, arguments, message):
    assert message in refused(capsys, "encoder", *arguments)
    assert not (here / "x.safetensors").exists()


def test_files_of_the_other_recurrence_by_force(here, capsys, fitted):
    common = ["encoder", "encode", ENC, "--prompt", "a cat", "--recurrence", "mamba2", *fitted]
    code, _, err = run(capsys, *common, "--force", "--out", "forced.safetensors")
    assert code == 0 and err.count("its statistics are of other vectors") == 2
    common = ["encoder", "report", ENC, "--prompts", "prompts.tsv", "--recurrence", "mamba2", *fitted]
    code, text, err = run(capsys, *common, "--force")
    assert "mamba2 calibrated" in text and "its statistics are of other vectors" in err


def test_nan_is_a_problem(here, capsys, monkeypatch):
    broken = torch.full((1, 1, 24), math.nan), torch.ones(1, 1, dtype=torch.bool)
    monkeypatch.setattr(encoders.Encoder, "encode_ids", lambda *_: broken)
    code, _, err = run(capsys, "encoder", "encode", ENC, "--prompt", "a", "--out", "nan.safetensors")
    assert code == 1 and "not finite in float32" in err and not (here / "nan.safetensors").exists()


def test_without_transformers(here, capsys, monkeypatch):
    monkeypatch.setattr("anima_fast.commands.encoder._has_transformers", lambda: False)
    assert "pip install 'anima-fast[transformers]'" in refused(capsys, "encoder", "report", ENC, "--prompt", "a")
    assert run(capsys, "encoder", "inspect", ENC)[0] == 0


def test_one_prompt_and_a_picture(here, capsys):
    code, text, _ = run(capsys, "encoder", "report", ENC, "--prompt", "a", "--plot", "one_prompt.png")
    assert code == 0 and "-" in text.splitlines()[6] and shortest_side("one_prompt.png") > 400


@pytest.mark.parametrize("action", ["inspect", "encode", "fit-alignment", "fit-calibration", "report", "sweep"])
def test_help_has_an_example(capsys, action):
    with pytest.raises(SystemExit) as exit_:
        run(capsys, "encoder", action, "--help")
    assert exit_.value.code == 0 and f"anima-fast encoder {action}" in capsys.readouterr().out.split("example", 1)[1]
