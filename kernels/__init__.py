"""Triton kernels, one file an op. They import torch and triton only; `anima_fast.dispatch` decides when they run."""
