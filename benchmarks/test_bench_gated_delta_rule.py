"""`pytest benchmarks`: the gated delta rule and its step, and their peers, under pytest-benchmark."""

from __future__ import annotations

import pytest
from scan_suite import cases, run

# Warnings are errors in our tests; those of other packages are about their own insides.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(("case", "contender"), cases("gated_delta_rule", "gated_delta_step"))
def test_bench_gated_delta_rule(benchmark, case, contender):
    run(benchmark, case, contender)
