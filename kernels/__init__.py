"""Triton kernels, one file an op. They import torch and triton only; `anima_fast.dispatch` says when they run."""
