"""`pytest benchmarks`: Mamba2's scan and its step, and their peers, under pytest-benchmark."""

from __future__ import annotations

import pytest
from scan_suite import cases, run

# Warnings are errors in our tests; those of other packages are about their own insides.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(("case", "contender"), cases("ssd_chunk_scan", "ssd_state_update"))
def test_bench_ssd_chunk_scan(benchmark, case, contender):
    run(benchmark, case, contender)
