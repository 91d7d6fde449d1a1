"""The measuring behind `anima-fast bench`: its gate, its memory meter, its peers, and a small run of all of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anima_fast.bench.cases import MODES, Case, region_masks, token_grid
from anima_fast.bench.measure import Oracle, measure, peak_bytes, report
from anima_fast.bench.peers import Contender, Prepared, aligned_bias, contenders

CPU = torch.device("cpu")
SMALL = {"width": 256, "height": 192, "heads": 2, "head_dim": 32, "tokens": 9, "pad_to": 40}


def small(mode: str, **changes) -> Case:
    return Case(mode=mode, **{**SMALL, **changes})


@pytest.mark.parametrize(
    ("pixels", "grid", "canvas"),
    [
        ((1024, 1024), (1, 64, 64), (64.0, 64.0)),
        ((832, 1216), (1, 76, 52), (76.0, 52.0)),
        ((1000, 1016), (1, 64, 63), (63.5, 62.5)),  # latents of 125 x 127
        ((17, 16), (1, 1, 2), (1.0, 17 / 16)),
    ],
)
def test_token_grid_rounds_as_anima_does(pixels, grid, canvas):
    assert token_grid(*pixels) == (grid, canvas)


@pytest.mark.parametrize(("layout", "count"), [("halves", 2), ("quadrants", 4), ("centre", 2), ("circles", 16)])
def test_layouts_cover_the_picture(layout, count):
    masks = torch.stack(region_masks(layout, count, (96, 128)))
    assert masks.shape == (count, 96, 128)
    assert float(masks.min()) >= 0 and float(masks.max()) <= 1
    total = masks.sum(dim=0)
    if layout == "circles":
        assert float((total > 1).float().mean()) > 0.3, "circles are there to overlap"
    else:
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mode": "soft"}, "mode"),
        ({"layout": "thirds"}, "layout"),
        ({"dtype": "fp8"}, "dtype"),
        ({"tokens": 0}, "tokens"),
        ({"pad_to": 3}, "pad_to"),
        ({"layout": "halves", "regions": 5}, "regions"),
    ],
)
def test_bad_cases_are_refused(changes, named):
    with pytest.raises(ValueError, match=rf"^{named}: got .*; allowed: "):
        small(**{"mode": "hard", **changes})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_everything_that_runs_here_passes_the_gate(mode, dtype):
    """Peers compute what ours do: their masks, folded pads and blends are right. (FlexAttention: the slow test.)"""
    problem = small(mode, dtype=dtype).build()
    chosen = [c for c in contenders() if c.name != "flex"]
    results = measure(problem, chosen, rounds=1)
    assert {r.name for r in results} == {c.name for c in chosen if mode in c.modes}
    for result in results:
        assert result.status != "gate failed", f"{result.name}: {result.reason}"
    measured = {r.name for r in results if r.status == "measured"}
    assert {"torch", "reference", "stock"} <= measured


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_flex_attention_passes_the_gate():
    flex = [c for c in contenders() if c.name == "flex"]
    for mode in ("soft_log", "hard"):
        problem = small(mode).build()
        reason = flex[0].needs(problem)
        if reason:
            pytest.skip(reason)
        (result,) = measure(problem, flex, rounds=2)
        assert result.status == "measured", result.reason
        assert result.cold_ms > 3 * min(result.samples_ms), "compiled anew at each call?"


def wrong_in_one_value(problem):
    """Right but for one query of one head."""
    right = next(c for c in contenders() if c.name == "reference").prepare(problem).call

    def call():
        out = right()
        out[0, -1, 7] += 1e-3
        return out

    return Prepared(call)


def not_a_number(problem):
    """Right where the gate looks, with a NaN in a head it does not."""
    right = next(c for c in contenders() if c.name == "reference").prepare(problem).call

    def call():
        out = right()
        out[0, 1, 0, 0] = torch.nan
        return out

    return Prepared(call)


def without_pads(problem):
    """The mistake of packs that strip the pads: another result."""
    index = torch.cat([torch.arange(start, end) for start, end, _ in problem.spans])
    k, v = problem.k[:, :, index], problem.v[:, :, index]
    return Prepared(lambda: torch.nn.functional.scaled_dot_product_attention(problem.q, k, v))


def transposed(problem):
    return Prepared(lambda: problem.q.transpose(1, 2))


@pytest.mark.parametrize("mistake", [wrong_in_one_value, not_a_number, without_pads, transposed])
def test_the_gate_catches_a_wrong_contender(mistake):
    problem = small("soft_log", heads=3).build()
    (result,) = measure(problem, [Contender("mistaken", "peer", mistake)], rounds=3)
    assert result.status == "gate failed" and result.reason
    assert result.samples_ms == [] and result.peak_bytes is None, "what fails is not timed"


def test_a_quantising_peer_is_held_to_its_own_figure():
    problem = small("soft_log").build()
    exact = next(c for c in contenders() if c.name == "reference").prepare(problem).call

    def rough(by):
        return lambda problem: Prepared(lambda: exact() * (1 + by))

    kept = Contender("rough", "peer", rough(0.02), nrmse=0.03)
    lost = Contender("rougher", "peer", rough(0.04), nrmse=0.03)
    assert [r.status for r in measure(problem, [kept, lost], rounds=1)] == ["measured", "gate failed"]


def test_the_oracle_takes_pads_as_ordinary_rows():
    """Ours folds pads, so the oracle must not: it is checked against softmax over all padded rows, written out."""
    problem = small("soft_log").build()
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    bias = problem.rows.double().T.repeat_interleave(SMALL["pad_to"], dim=1)
    expected = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias, dim=-1) @ v
    oracle = Oracle(problem)
    torch.testing.assert_close(oracle.expected, expected[:, oracle.heads][:, :, oracle.queries], rtol=1e-9, atol=1e-12)


def test_the_meter_measures_known_allocations():
    """Peak, not sum: two blocks held at once, one freed before the third; the result does not count."""
    mib = 2**18  # floats in a MiB

    def call():
        first = torch.zeros(8 * mib)
        second = torch.zeros(4 * mib)
        del first
        third = torch.zeros(5 * mib)
        del second, third
        return torch.zeros(2 * mib)

    assert peak_bytes(call, CPU) == 10 * 2**20  # the peak of 12 MiB, less a result of 2


WITNESS = """
import gc
from pathlib import Path

import torch

from anima_fast.bench.measure import peak_bytes


def high_water():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def call():
    q = torch.randn(1, 4, 4096, 64)
    mask = torch.zeros(4096, 4096)  # 64 MiB
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


call()  # whatever threads and libraries keep
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = high_water()
out = call()
seen = high_water() - before
print(seen, peak_bytes(call, torch.device("cpu")) + out.numel() * out.element_size())
"""


def test_the_meter_agrees_with_resident_memory():
    """An independent witness: the kernel's high-water mark of a process of its own, with no cold pages to lose."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc of Linux")
    done = subprocess.run([sys.executable, "-c", WITNESS], capture_output=True, text=True)
    if "PermissionError" in done.stderr or "OSError" in done.stderr:
        pytest.skip("the kernel does not let us reset the mark")
    assert done.returncode == 0, done.stderr
    seen, metered = map(int, done.stdout.split())
    assert metered > 64 * 2**20
    assert abs(seen - metered) < 0.15 * metered, f"resident {seen / 2**20:.1f} MiB, metered {metered / 2**20:.1f} MiB"


@pytest.mark.parametrize("keys", [1, 7, 8, 77, 312, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_for_xformers_is_aligned(keys, dtype):
    bias = torch.randn(1, 1, 5, keys).to(dtype)
    aligned = aligned_bias(bias)
    assert torch.equal(aligned, bias)
    assert aligned.stride(-1) == 1
    assert aligned.stride(-2) % 8 == 0
    assert aligned.expand(1, 16, -1, -1).stride() == (aligned.stride(0), 0, aligned.stride(-2), 1), "no copy a head"


def test_peers_that_cannot_run_say_why():
    problem = small("soft_log").build()
    results = {r.name: r for r in measure(problem, [c for c in contenders() if c.name != "flex"], rounds=1)}
    for name in ("xformers", "kitchen_int8"):
        assert results[name].status == "not executed"
        assert "not installed" in results[name].reason or "CUDA" in results[name].reason


def test_report_holds_every_sample_and_what_it_was_made_on():
    case = small("hard")
    problem = case.build()
    chosen = [c for c in contenders() if c.name in ("torch", "stock", "sdpa_mask")]
    heard = []
    results = measure(problem, chosen, rounds=2, progress=heard.append)
    assert len(heard) == len(chosen) * 3
    document = report([(dataclasses.asdict(case), problem, results)], rounds=2)
    assert document["format"] == "anima_fast.bench.attention/1"
    assert {"torch", "python", "cpu", "commit", "threads"} <= set(document["machine"])
    (described,) = document["cases"]
    for entry in described["results"]:
        assert len(entry["samples_ms"]) == 2 and entry["cold_ms"] > 0
        assert entry["extra_bytes"] == entry["peak_bytes"] + entry["held_bytes"]
    mask = next(e for e in described["results"] if e["name"] == "sdpa_mask")
    assert mask["held_bytes"] == described["padded_mask_bytes"], "a mask kept between calls is memory too"
