"""Shows that after `warmup` no call compiles anything, whatever its shapes. Run by test_triton_budget.py.

There is no GPU: a driver that only names one stands in, and launches stop where Triton would hand them to the card.
"""

import contextlib
import os
import tempfile
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import torch
from anima_fast.kernels import regional_attention as kernel
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

HEADS, HEAD_DIM = 16, 128


def call(combine, B, Nq, Nk, S, *, bias=True, order=True, lse=False, contiguous=False):
    def tensor(N):
        shape = (B, HEADS, N, HEAD_DIM) if contiguous else (B, N, HEADS, HEAD_DIM)
        t = torch.empty(shape, dtype=torch.bfloat16)
        return t if contiguous else t.transpose(1, 2)

    q, k, v, out = tensor(Nq), tensor(Nk), tensor(Nk), tensor(Nq)
    plan = SimpleNamespace(
        bias=torch.empty(1, S, Nq if bias else 0),
        order=torch.empty(1, Nq if order else 0, dtype=torch.int32),
        segments=torch.empty(1, S, 3, dtype=torch.int32),
        plan_index=torch.zeros(B, dtype=torch.int32),
    )
    denominators = torch.empty(B, HEADS, Nq) if lse else None
    kernel.regional_attention(q, k, v, out, denominators, plan, scale=0.1, combine=combine, mask=None)


def main():
    target = GPUTarget("cuda", 89, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    kernel._device_capability = lambda device: (8, 9)
    kernel.INTERPRETER_CAPABILITY = (8, 9)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    jit = kernel._regional_attention_kernel
    launch = jit.run
    jit.run = lambda *args, **options: launch(*args, **options | {"warmup": True})

    asked = sum(kernel.warmup("cuda", torch.bfloat16, HEAD_DIM, c, num_heads=HEADS) for c in kernel.COMBINES)
    compiled = len(jit.device_caches[0][0])
    assert compiled == asked == 8, (compiled, asked)
    for lse in (False, True):
        call("logit", 2, 4096, 308, 5, lse=lse)
        call("logit", 1, 4095, 77, 1, lse=lse)
        call("logit", 1, 1, 1, 1, order=False, lse=lse)
        call("logit", 3, 17, 2, 2, bias=False, order=False, lse=lse, contiguous=True)
    call("blend", 1, 16384, 512, 17)
    call("blend", 2, 33, 5, 3, order=False, contiguous=True)
    assert len(jit.device_caches[0][0]) == compiled, "a call compiled what warmup had not"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"]:
        main()
