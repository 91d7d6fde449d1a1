"""The command line: run in process, and once as a program. Exit codes, JSON, pictures, one line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from anima_fast import RegionPlan
from anima_fast.bench.scan_cases import OPS
from anima_fast.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
REGION_FILES = sorted((EXAMPLES / "regions").glob("*.json"))
TINY = ["--size", "128x128", "--heads", "2", "--head-dim", "32", "--tokens", "5", "--pad-to", "16", "--rounds", "1"]
FEW = ["--backends", "torch", "--peers", "stock"]
TINY_SCANS = ["--shapes", "ssd:4,8,16,2", "delta:4,8,16,2", "--lengths", "1", "70", "--rounds", "1"]


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command that argparse accepts."""
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    """The one line on stderr of a command that exits with 2."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("anima-fast") and captured.err.count("\n") == 1, captured.err
    return captured.err


def mask(path, size=(64, 64), box=(0, 0, 64, 64), mode="L"):
    image = Image.new(mode, size, 0)
    image.paste(255 if mode == "L" else (255, 255), box)
    image.save(path)
    return path


def region_file(folder, **changes):
    mask(folder / "left.png", box=(0, 0, 32, 64))
    mask(folder / "right.png", box=(32, 0, 64, 64))
    content = {
        "size": "256x256",
        "regions": [
            {"name": "left", "mask": "left.png", "tokens": 77, "pads": 435},
            {"name": "right", "mask": "right.png", "tokens": 20, "pads": 492},
        ],
    }
    content.update(changes)
    path = folder / "regions.json"
    path.write_text(json.dumps(content))
    return path


# ------------------------------------------------------------------------------------------------------------ all


@pytest.mark.parametrize("command", ["info", "regions", "generate", "bench", "bench attention", "bench scan", "warmup"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"anima-fast {command}" in text.partition("example")[2]
    assert "--json" in text


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"], ["bench"], ["bench", "nonsense"]])
def test_bad_options_are_one_line(capsys, arguments):
    assert "--help" in refused(capsys, *arguments)


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "anima_fast.cli", "info", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["torch"] == torch.__version__
    assert done.stderr == ""


# ----------------------------------------------------------------------------------------------------------- info


def test_info(capsys):
    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    for name in ("anima_fast", "torch", "python", "cpu", "extension", "regional_attention", "reference  usable"):
        assert name in out


def test_info_json(capsys):
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["backends"]["regional_attention"]["reference"] is None
    assert found["threads"] == torch.get_num_threads()


def test_info_says_what_to_do_without_the_extension(capsys, monkeypatch):
    reason = "the C++ extension is not installed (no compiler); install a C++17 compiler"
    monkeypatch.setattr("anima_fast.bench.machine.unavailable", lambda: reason)
    code, out, _ = run(capsys, "info")
    assert code == 0 and reason in out


# -------------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("path", REGION_FILES, ids=lambda p: p.stem)
def test_the_example_region_files(capsys, tmp_path, path):
    code, out, _ = run(capsys, "regions", path, "--out", tmp_path / "out", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["size"] == [int(n) for n in json.loads(path.read_text())["size"].split("x")]
    assert sorted(report["files"]) == sorted(p.name for p in (tmp_path / "out").iterdir())
    plan = RegionPlan.load(tmp_path / "out" / "plan.safetensors")
    bound = plan.bind(tuple(report["grid"]), tuple(report["canvas"]))
    assert len(bound.segments) == len(report["regions"]) + (report["base"] is not None)


def test_the_example_masks_are_what_their_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import make_masks
    import numpy as np

    monkeypatch.setattr(make_masks, "OUT", tmp_path)
    make_masks.main()
    drawn = {p.name for p in tmp_path.iterdir()}
    assert drawn == {p.name for p in (EXAMPLES / "masks").iterdir()}
    for name in drawn:
        with Image.open(tmp_path / name) as new, Image.open(EXAMPLES / "masks" / name) as committed:
            difference = np.abs(np.asarray(new, dtype=int) - np.asarray(committed, dtype=int))
        assert difference.max() <= 1, name  # another libm may round otherwise


def test_regions_from_masks(capsys, tmp_path):
    left = mask(tmp_path / "left.png", (64, 64), (0, 0, 32, 64))
    right = mask(tmp_path / "right.png", (64, 64), (32, 0, 64, 64), mode="LA")
    code, out, err = run(capsys, "regions", left, right, "--size", "832x1216", "--out", tmp_path / "out")
    assert code == 0
    assert "52 x 76 tokens (3952)" in out and "left" in out and "uncovered 0 %" in out
    assert err.count("stretched") == 2
    grid = 1024 // 76
    with Image.open(tmp_path / "out" / "weights_left.png") as picture:
        assert picture.width > 52 * grid and picture.height > 76 * grid
        assert picture.getpixel((60, 300)) > (200, 200, 100), "the left half is light"
    for name in ("overlay.png", "tokens.png", "weights_right.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) >= 700


def test_the_preview_shows_the_regions_where_they_are(capsys, tmp_path):
    from anima_fast.commands.region_pictures import colours

    run(capsys, "regions", region_file(tmp_path), "--out", tmp_path)
    first, second = colours(2)
    with Image.open(tmp_path / "overlay.png") as picture:
        assert picture.getpixel((36 + 100, 36 + 900)) == first
        assert picture.getpixel((36 + 900, 36 + 900)) == second
    with Image.open(tmp_path / "tokens.png") as picture:
        assert picture.getpixel((36 + 32, 36 + 32)) == first  # the middle of a cell of 64


def test_masks_of_one_name_get_names_of_their_own(capsys, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        mask(tmp_path / folder / "face.png")
    masks = [tmp_path / "a" / "face.png", tmp_path / "b" / "face.png"]
    code, out, _ = run(capsys, "regions", *masks, "--out", tmp_path, "--size", "64x64", "--json")
    assert code == 0
    report = json.loads(out)
    assert [r["name"] for r in report["regions"]] == ["face", "face 2"]
    assert {"weights_face.png", "weights_face_2.png"} <= set(report["files"])
    assert report["overlap"] == 1.0


@pytest.mark.parametrize(
    ("changes", "boxes", "warning"),
    [
        ({}, {"right.png": (48, 0, 64, 64)}, "25.0 % of the tokens are in no region"),
        ({"mode": "hard"}, {"right.png": (48, 0, 64, 64)}, "25.0 % of the tokens are excluded by every prompt"),
        (
            {"mode": "hard", "base": {"tokens": 4}},
            {"right.png": (48, 0, 64, 64)},
            "25.0 % of the tokens are in no region: there only",
        ),
        ({}, {"right.png": (0, 0, 0, 0)}, "region 'right' is empty"),
        ({"mode": "hard"}, {"right.png": (0, 0, 1, 1)}, "region 'right' vanishes: mode 'hard'"),
        ({"eps": 0.2}, {"right.png": (0, 0, 1, 1)}, "region 'right' vanishes: its weight is eps"),
        ({"combine": "blend"}, {"right.png": (48, 0, 64, 64)}, "25.0 % of the tokens are excluded by every prompt"),
    ],
)
def test_warnings(capsys, tmp_path, changes, boxes, warning):
    path = region_file(tmp_path, **changes)
    for name, box in boxes.items():
        mask(tmp_path / name, box=box)
    code, out, err = run(capsys, "regions", path, "--out", tmp_path)
    assert code == 0
    assert f"anima-fast regions: warning: {warning}" in err
    assert "written to" in out
    _, out, err = run(capsys, "regions", path, "--out", tmp_path, "--json")
    assert any(w.startswith(warning) for w in json.loads(out)["warnings"]) and err == ""


def test_no_warnings_where_nothing_is_wrong(capsys, tmp_path):
    _, _, err = run(capsys, "regions", region_file(tmp_path), "--out", tmp_path)
    assert err == ""


REGION = {"name": "left", "mask": "left.png", "tokens": 77}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "big"}, "size: got 'big'; allowed: WIDTHxHEIGHT"),
        ({"size": 1024}, "size: got 1024; allowed: a string"),
        ({"regions": []}, "regions: got an empty list; allowed: at least one region"),
        ({"regions": "left.png"}, 'regions: got "left.png"; allowed: a list'),
        ({"regions": [3]}, "regions[0]: got 3; allowed: an object"),
        ({"regions": [{"mask": "left.png"}]}, "regions[0].tokens: got nothing; allowed: a number; it is required"),
        ({"regions": [{"tokens": 3}]}, "regions[0].mask: got nothing; allowed: a string"),
        ({"regions": [{**REGION, "mask": "no.png"}]}, "regions[0].mask: no file"),
        ({"regions": [{**REGION, "mask": "regions.json"}]}, "regions[0].mask: got"),
        ({"regions": [{**REGION, "tokens": -1}]}, "regions[0].tokens: got -1; allowed: a whole number >= 0"),
        ({"regions": [{**REGION, "tokens": 1.5}]}, "regions[0].tokens: got 1.5; allowed: a whole number >= 0"),
        ({"regions": [{**REGION, "tokens": True}]}, "regions[0].tokens: got true; allowed: a number"),
        ({"regions": [{**REGION, "strength": -1}]}, "regions[0].strength: got -1; allowed: a finite number >= 0"),
        ({"regions": [{**REGION, "maks": 1}]}, "regions[0]: got the unknown key 'maks'; allowed: name | mask"),
        ({"regions": [REGION, REGION]}, "regions[1].name: got 'left' again; allowed: a unique name"),
        ({"base": {"pads": 3}}, "base.tokens: got nothing"),
        ({"base": 77}, "base: got 77; allowed: an object"),
        ({"mode": "sfot"}, "mode: got 'sfot'; allowed: 'soft_log' | 'hard'"),
        ({"eps": 0}, "eps: got 0; allowed: 0 < eps <= 1"),
        ({"normalize_overlaps": "no"}, 'normalize_overlaps: got "no"; allowed: true or false'),
        ({"token_ranges": [[0, 3]]}, "got the unknown key 'token_ranges'; allowed: size | base | regions"),
    ],
)
def test_bad_region_files(capsys, tmp_path, changes, message):
    path = region_file(tmp_path, **changes)
    line = refused(capsys, "regions", path, "--out", tmp_path / "out")
    assert str(path) in line and message in line
    assert not (tmp_path / "out").exists(), "nothing half-done"


def test_region_files_that_are_no_json(capsys, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"size": "64x64",\n "regions": [}')
    assert f"{path}: line 2, column 14" in refused(capsys, "regions", path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "allowed: JSON text" in refused(capsys, "regions", path)
    path.write_text("[]")
    assert f"{path}: got a list; allowed: an object" in refused(capsys, "regions", path)
    assert "no file" in refused(capsys, "regions", tmp_path / "none.json")
    assert "one region file" in refused(capsys, "regions", path, mask(tmp_path / "a.png"))


@pytest.mark.parametrize("size", ["1024", "0x64", "8x8", "1024x1024x3", "-64x64", "1e3x64"])
def test_bad_sizes(capsys, tmp_path, size):
    assert "allowed: WIDTHxHEIGHT" in refused(capsys, "regions", mask(tmp_path / "a.png"), f"--size={size}")


def test_out_that_is_a_file(capsys, tmp_path):
    path = mask(tmp_path / "a.png")
    assert "allowed: a directory" in refused(capsys, "regions", path, "--out", path)


# ---------------------------------------------------------------------------------------------------------- bench


def test_bench_table(capsys):
    code, out, err = run(capsys, "bench", "attention", *TINY, *FEW, "--mode", "all")
    assert (code, err) == (0, "")
    for mode in ("soft_log", "hard", "blend", "plain"):
        assert f"\n{mode}, 128x128" in f"\n{out}"
    assert out.count("  stock ") == 4


def test_bench_json_and_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    files = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    code, out, _ = run(capsys, "bench", "attention", *TINY, *FEW, *files, "--size", "64x64")
    assert code == 0 and "warm ms" in out
    document = json.loads((tmp_path / "out.json").read_text())
    assert [(c["width"], c["height"]) for c in document["cases"]] == [(128, 128), (64, 64)]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 1760


def test_bench_json_on_stdout(capsys):
    code, out, err = run(capsys, "bench", "attention", *TINY, *FEW, "--layout", "circles", "--regions", "3", "--json")
    assert (code, err) == (0, "")
    (case,) = json.loads(out)["cases"]
    assert (case["regions"], case["prompts"]) == (3, 3)
    assert {r["name"]: r["status"] for r in case["results"]} == {"torch": "measured", "stock": "measured"}


def test_bench_exits_1_when_the_gate_fails(capsys, monkeypatch):
    from anima_fast.bench import peers

    def wrong(problem):
        return peers.Prepared(lambda: torch.zeros_like(problem.q))

    broken = peers.Contender("broken", "peer", wrong)
    monkeypatch.setattr("anima_fast.commands.bench.peers", lambda: (broken,))
    code, out, err = run(capsys, "bench", "attention", *TINY, "--backends", "torch")
    assert code == 1
    assert "broken: gate failed (error" in out
    assert "failed the gate, not timed: broken" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "flash"], "--peers: got 'flash'; allowed: stock | sdpa_mask"),
        (["--backends", "cuda"], "--backends: got 'cuda'; allowed: cpu | triton | torch | reference"),
        (["--backends", "--peers"], "nothing to measure"),
        (["--regions", "5"], "regions: got 5; allowed: 4"),
        (["--pad-to", "4"], "pad_to: got 4; allowed: at least the 5 tokens"),
        (["--rounds", "0"], "allowed: a whole number >= 1"),
        (["--tokens", "x"], "invalid whole number value"),
        (["--device", "tpu9"], "--device: got 'tpu9'"),
        (["--json", "/no/such/place/out.json"], "its directory does not exist"),
        (["--dtype", "fp8"], "invalid choice"),
    ],
)
def test_bench_refuses_bad_input(capsys, arguments, message):
    assert message in refused(capsys, "bench", "attention", *TINY, *arguments)


# ----------------------------------------------------------------------------------------------------- bench scan


@pytest.fixture
def small_matmul(monkeypatch):
    monkeypatch.setattr("anima_fast.bench.scan_measure.MATMUL_SIZES", (64,))


def test_bench_scan_table(capsys, small_matmul):
    code, out, err = run(capsys, "bench", "scan", *TINY_SCANS, "--backends", "torch", "--peers", "dense_64", "loop")
    assert (code, err) == (0, "")
    for op in OPS:
        assert f"\n{op}, " in f"\n{out}"
    assert out.count("  dense_64 ") == 2 and "of mm" in out and "not the machine's limit" in out
    assert out.count("ssd_chunk_scan, H 4 P 8 N 16 G 2, L ") == 2


def test_bench_scan_json(capsys, tmp_path, small_matmul):
    one = ["--ops", "gated_delta_rule", "--backends", "torch", "--peers"]
    code, out, _ = run(capsys, "bench", "scan", *TINY_SCANS, *one, "--no-final-state", "--json")
    document = json.loads(out)
    assert code == 0 and [c["length"] for c in document["cases"]] == [1, 70]
    assert all(c["shape"]["groups"] == 2 and not c["final_state"] for c in document["cases"])
    code, out, _ = run(capsys, "bench", "scan", *TINY_SCANS, *one, "--json", tmp_path / "out.json")
    assert code == 0 and "warm ms" in out
    assert len(json.loads((tmp_path / "out.json").read_text())["cases"]) == 2


def test_bench_scan_linear(capsys, small_matmul):
    code, out, _ = run(capsys, "bench", "scan", "--linear", *TINY_SCANS, "--backends", "torch", "--peers", "dense_64")
    assert code == 0
    table = out.partition("linear in L")[2].partition("\n\n")[0]
    assert [line.split()[-8] for line in table.splitlines()[2:]] == ["1", "70"] * 3, table
    assert "causal_conv1d" not in out


def test_bench_scan_exits_1_when_the_gate_fails(capsys, monkeypatch, small_matmul):
    from anima_fast.bench.scan_peers import Contender, Prepared

    broken = Contender("broken", "peer", {"causal_conv1d": lambda p: Prepared(lambda: (torch.zeros_like(p.first),))})
    monkeypatch.setattr("anima_fast.commands.bench_scan.peers", lambda: (broken,))
    code, out, err = run(capsys, "bench", "scan", *TINY_SCANS, "--backends", "--lengths", "9")
    assert code == 1
    assert "broken: gate failed (error" in out
    assert "failed the gate, not timed: broken" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "flash"], "--peers: got 'flash'; allowed: transformers_256"),
        (["--backends", "triton"], "--backends: got 'triton'; allowed: cpu | cuda | torch | reference"),
        (["--shapes", "mamba3"], "--shapes: got 'mamba3'; allowed: all | mamba2-2.7b"),
        (["--shapes", "ssd:5,8,16,2"], "--shapes: got 'ssd:5,8,16,2'"),
        (["--shapes", "ssd:4,8,512,2"], "N"),
        (["--ops", "gated_delta_rule", "--shapes", "ssd:4,8,16,2"], "nothing to measure"),
        (["--backends", "--peers"], "nothing to measure"),
        (["--lengths", "0"], "allowed: a whole number >= 1"),
        (["--ops", "scan"], "invalid choice"),
        (["--device", "tpu9"], "--device: got 'tpu9'"),
        (["--json", "/no/such/place/out.json"], "its directory does not exist"),
        (["--linear", "--models"], "not allowed with"),
        (["--models", "--shapes", "all"], "--shapes: got ['all']; allowed: nothing with --models"),
    ],
)
def test_bench_scan_refuses_bad_input(capsys, arguments, message):
    assert message in refused(capsys, "bench", "scan", "--rounds", "1", *arguments)


# --------------------------------------------------------------------------------------------------------- warmup


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to compile here")
def test_warmup_without_a_gpu(capsys):
    code, out, err = run(capsys, "warmup")
    assert (code, err) == (0, "")
    assert out.startswith("Nothing to compile: no CUDA device")
    code, out, _ = run(capsys, "warmup", "--json")
    assert code == 0
    assert json.loads(out)["compiled"] == []


def test_warmup_refuses_other_devices(capsys):
    assert "--device: got 'cpu'; allowed: a CUDA device" in refused(capsys, "warmup", "--device", "cpu")
    assert "--device: got 'gpu'" in refused(capsys, "warmup", "--device", "gpu")


def test_warmup_compiles_each_kind(capsys, monkeypatch):
    """As on a machine with a card, the card and the compilation replaced."""
    pytest.importorskip("triton")
    from anima_fast.kernels import regional_attention as kernel

    asked = []

    def compiled(device, dtype, head_dim, combine, *, num_heads):
        asked.append((str(device), dtype, head_dim, combine, num_heads))
        return 6

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(kernel, "warmup", compiled)
    code, out, _ = run(capsys, "warmup", "--dtype", "bf16", "--json")
    assert code == 0
    assert [(e["combine"], e["dtype"], e["kernels"]) for e in json.loads(out)["compiled"]] == [
        ("logit", "bf16", 6),
        ("blend", "bf16", 6),
    ]
    assert {a[0] for a in asked} == {"cuda"} and {a[2:3] + a[4:] for a in asked} == {(128, 16)}
