"""`pytest benchmarks`: the causal convolution and its step, and their peers, under pytest-benchmark."""

from __future__ import annotations

import pytest
from scan_suite import cases, run

# Warnings are errors in our tests; those of other packages are about their own insides.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(("case", "contender"), cases("causal_conv1d", "causal_conv1d_update"))
def test_bench_causal_conv1d(benchmark, case, contender):
    run(benchmark, case, contender)
