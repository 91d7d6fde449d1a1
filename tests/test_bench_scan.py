"""The measuring behind `anima-fast bench scan`: its gate, its count of operations, its peers, and a small run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from anima_fast.bench import scan_models
from anima_fast.bench.scan_cases import OPS, SHAPES, Case, operations, parse_shape
from anima_fast.bench.scan_measure import Oracle, measure, report
from anima_fast.bench.scan_peers import Contender, Prepared, contenders

SMALL = {"ssd": parse_shape("ssd:6,8,16,2"), "delta": parse_shape("delta:6,8,16,3")}
ALL = [(op, family) for op, (families, _) in OPS.items() for family in families]


def small(op: str, family: str, **changes) -> Case:
    return Case(op, SMALL[family], **{"length": 70 if OPS[op][1] else 1, **changes})


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch):
    monkeypatch.setattr("anima_fast.bench.scan_measure.MATMUL_SIZES", (64,))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("op", "family"), ALL)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_everything_that_runs_here_passes_the_gate(op, family, dtype):
    measured = measure(small(op, family, dtype=dtype), contenders(), rounds=1)
    assert {r.name for r in measured.results} == {c.name for c in contenders() if op in c.ways}
    for result in measured.results:
        assert result.status != "gate failed", f"{result.name}: {result.reason}"
        assert result.summary
    assert {"torch", "reference"} <= {r.name for r in measured.results if r.status == "measured"}


@pytest.mark.parametrize("op", ["ssd_chunk_scan", "gated_delta_rule"])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_peers_without_a_final_state(op, length):
    problem = small(op, OPS[op][0][0], length=length, final_state=False).build()
    oracle = Oracle(problem)
    for each in contenders():
        if op in each.ways and each.needs(problem) is None:
            wrong = oracle.check(each.ways[op](problem).call(), problem, each.tolerance)[2]
            assert wrong is None, f"{each.name}: {wrong}"


def contender(op: str, prepare) -> Contender:
    return Contender("mistaken", "peer", {op: prepare})


def first_state_only(problem):
    """Right y, and the state of another head."""

    def call():
        y, state = problem.run("reference")
        return y, state.roll(1, dims=1)

    return Prepared(call)


def not_a_number(problem):
    """Right where the gate looks, with a NaN in a head it does not."""

    def call():
        y, state = problem.run("reference")
        y[0, 3, 1, 0] = torch.nan
        return y, state

    return Prepared(call)


def late_token(problem):
    def call():
        y, state = problem.run("reference")
        y[0, -1, -1] += 1e-3 * y.abs().max()
        return y, state

    return Prepared(call)


def forgets_between_chunks(problem):
    """Each chunk of 64 from an empty state: right, were the decays so strong that nothing is remembered anyway."""

    def call():
        parts = []
        for start in range(0, problem.length, 64):
            tokens = {
                name: x[:, start : start + 64] if isinstance(x, torch.Tensor) and x.ndim > 1 else x
                for name, x in problem.arguments.items()
            }
            parts.append(dataclasses.replace(problem, arguments=tokens).run("reference"))
        return torch.cat([y for y, _ in parts], dim=1), parts[-1][1]

    return Prepared(call)


def no_state(problem):
    return Prepared(lambda: problem.run("reference")[:1])


def other_type(problem):
    return Prepared(lambda: tuple(x.double() for x in problem.run("reference")))


@pytest.mark.parametrize(
    "mistake", [first_state_only, not_a_number, late_token, forgets_between_chunks, no_state, other_type]
)
@pytest.mark.parametrize(("op", "family"), [("ssd_chunk_scan", "ssd"), ("gated_delta_rule", "delta")])
def test_the_gate_catches_a_wrong_contender(op, family, mistake):
    (result,) = measure(small(op, family), [contender(op, mistake)], rounds=2).results
    assert result.status == "gate failed" and result.reason
    assert result.samples_ms == [] and result.peak_bytes is None, "what fails is not timed"


@pytest.mark.parametrize(("op", "family"), [("ssd_state_update", "ssd"), ("causal_conv1d_update", "ssd")])
def test_the_gate_looks_at_what_is_changed_in_place(op, family):
    def forgets(problem):
        return Prepared(lambda: problem.with_own_state().run("reference"))

    (result,) = measure(small(op, family), [contender(op, forgets)], rounds=1).results
    assert result.status == "gate failed"


@pytest.mark.parametrize(("op", "family"), [pair for pair in ALL if OPS[pair[0]][1]])
def test_the_oracle_of_a_few_heads_is_that_of_all(op, family):
    problem = small(op, family).build()
    oracle = Oracle(problem)
    assert oracle.chosen is not None and len(oracle.chosen) == 3
    selected = problem.select(problem.run("reference", torch.float64), oracle.chosen)
    for x, expected in zip(selected, oracle.expected, strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-14)


def test_contenders_do_not_share_what_they_change():
    problem = small("ssd_state_update", "ssd").build()
    before = problem.arguments["state"].clone()
    problem.with_own_state().run("torch")
    assert torch.equal(problem.arguments["state"], before)


@pytest.mark.parametrize("name", ["mamba2-2.7b", "encoder-mamba2", "qwen3.5-4b"])
def test_operations_are_those_of_the_formula(name):
    """The formula per token for whole chunks, less what the first and the last chunk do not need."""
    shape, length, q = SHAPES[name], 512, 64
    _, heads, p, n, groups = shape
    if shape.family == "ssd":
        whole = length * heads * (4 * n * p + q * p) + length * groups * q * n
        reads = 1
    else:
        whole = length * heads * (6 * n * p + 2 * q * p) + length * groups * 2 * q * n
        reads = 2
    product = q * 2 * heads * n * p
    assert operations(shape, length, final_state=True) == whole - reads * product
    assert operations(shape, length, final_state=False) == whole - (reads + 1) * product


def test_a_last_short_chunk_counts_its_own_tokens():
    shape = SMALL["ssd"]
    one = operations(shape, 1, final_state=True)
    assert one == 6 * 8 + 2 * 16 + 2 * 6 * 8 * 16
    read = 2 * 6 * 8 * 16
    assert operations(shape, 65, final_state=True) == operations(shape, 64, final_state=True) + one + read


@pytest.mark.parametrize(
    "text", ["", "mamba", "ssd:1,2,3", "ssd:4,8,16,3", "delta:4,8,16,-2", "conv:1,1,1,1", "ssd:a,1,1,1"]
)
def test_bad_shapes_are_refused(text):
    with pytest.raises(ValueError, match=r"^--shapes: got .*; allowed: all"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"op": "scan"}, "op"),
        ({"dtype": "fp8"}, "dtype"),
        ({"shape": SMALL["delta"]}, "shape"),
        ({"length": 0}, "length"),
        ({"op": "ssd_state_update", "length": 2}, "length"),
    ],
)
def test_bad_cases_are_refused(changes, named):
    with pytest.raises(ValueError, match=rf"^{named}: got .*; allowed: "):
        dataclasses.replace(small("ssd_chunk_scan", "ssd"), **changes)


def test_inputs_are_views_of_the_convolutions_output():
    arguments = small("ssd_chunk_scan", "ssd").build().arguments
    assert len({arguments[name].untyped_storage().data_ptr() for name in ("x", "B", "C")}) == 1
    assert arguments["x"].stride(-1) == 1 and arguments["x"].stride(1) == sum(SMALL["ssd"].channels)
    step = small("ssd_state_update", "ssd").build().arguments
    assert step["A"].stride() == (1, 0, 0) and step["dt"].stride(-1) == 0, "one number a head, not copied"


def test_what_takes_too_long_or_too_much_says_so():
    problem = Case("ssd_chunk_scan", parse_shape("ssd:1,1,1,1"), 2049).build()
    reasons = {c.name: c.needs(problem) for c in contenders() if "ssd_chunk_scan" in c.ways}
    assert "L 2049 > 2048" in reasons["loop"] and "L 2049 > 2048" in reasons["reference"]
    assert reasons["dense_64"] is None
    wide = dataclasses.replace(problem, shape=parse_shape("ssd:65536,1,1,1"))
    assert "GiB" in next(c for c in contenders() if c.name == "dense_64").needs(wide)
    for name in ("mamba_ssm",):
        assert "not installed" in reasons[name] or "CUDA" in reasons[name]


def test_report_holds_every_sample_and_what_it_was_made_on():
    chosen = [c for c in contenders() if c.name in ("torch", "dense_64", "loop")]
    heard = []
    measured = measure(small("ssd_chunk_scan", "ssd"), chosen, rounds=2, progress=heard.append)
    assert len(heard) == 3 * 3 + 2, "checks, rounds, and torch.mm in every round"
    document = report([measured], rounds=2)
    assert document["format"] == "anima_fast.bench.scan/1"
    assert {"torch", "python", "cpu", "commit", "threads"} <= set(document["machine"])
    (case,) = document["cases"]
    assert case["shape"] == SMALL["ssd"]._asdict() and case["operations"] == measured.operations
    assert len(case["matmul"]["samples"]) == 3 + 2 + 3, "before, in every round, after"
    assert case["matmul"]["best_gflops"] >= case["matmul"]["median_gflops"] > 0
    for entry in case["results"]:
        assert len(entry["samples_ms"]) == 2 and entry["calls"] >= 1
        rate = case["operations"] / entry["median_ms"] / 1e6
        assert entry["gflops"] == pytest.approx(rate)
        assert entry["share_of_matmul"] == pytest.approx(rate / case["matmul"]["best_gflops"])


def test_dense_chunks_take_memory_by_q_and_the_cpu_backend_does_not():
    case = Case("ssd_chunk_scan", parse_shape("ssd:8,16,16,1"), 2048)
    results = {r.name: r for r in measure(case, [c for c in contenders() if c.name in ("cpu", "dense_64")], 1).results}
    dense = 4 * 2048 * 64 * 8
    assert results["dense_64"].extra_bytes > dense
    if results["cpu"].status == "measured":
        assert results["cpu"].extra_bytes < dense / 4


@pytest.mark.filterwarnings("default")
def test_models_agree_with_anima_fast_on_and_off(monkeypatch):
    pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17")
    tiny = {
        "mamba2": dict(hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16),
        "encoder": dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
        | dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16),
    }
    for name, sizes in tiny.items():
        model = scan_models.MODELS[name]
        monkeypatch.setitem(scan_models.MODELS, name, model._replace(sizes={**model.sizes, **sizes}))
    models = scan_models.measure_models([9], rounds=2)
    assert [m.name for m in models] == ["mamba2", "encoder"]
    for model in models:
        off, on = model.results
        assert (off.status, on.status) == ("measured", "measured"), on.reason
        assert len(on.samples_ms) == 2
        assert 0 < on.error < 1e-4, "the same numbers to the bit: was it routed at all?"
    document = report([], 2, [m.as_dict() for m in models])
    assert document["models"][1]["results"][1]["tokens_per_second"] > 0
