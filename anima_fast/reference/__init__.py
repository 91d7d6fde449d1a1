"""Naive oracles, one file an op: the formula in the plainest form, any float type up to fp64."""
