"""The harness itself: planted bugs are found, the same kernels without them pass, and results are those of CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import simt
import torch

pytestmark = pytest.mark.skipif(simt.available() is not None, reason=str(simt.available()))

PLANTED = Path(__file__).parent / "planted"


@pytest.fixture(scope="module")
def library():
    return simt.build(tuple(sorted(PLANTED.glob("*.cu"))))


BUGS = {
    "missing_barrier": r"race: read of dynamic shared memory .* after thread \(31,0,0\)'s write, no __syncthreads",
    "read_before_barrier": r"thread \(0,0,0\): read of a __shared__ variable, which nothing has written yet",
    "missing_syncwarp": r"race: read of dynamic shared memory .*'s write, no __syncwarp",
    "divergent_barrier": r"divergent barrier: thread \(0,0,0\) is at __syncthreads .* thread \(32,0,0\)",
    "two_barriers": r"divergent barrier: .* thread \(1,0,0\) is at __syncthreads",
    "early_return": r"divergent barrier: .* thread \(63,0,0\) has returned",
    "divergent_shuffle": r"divergent warp collective: .* waits for thread \(31,0,0\), but that has returned",
    "global_off_by_one": r"thread \(63,0,0\): out of bounds: write of 4 bytes, 0 bytes after the end of buffer 1 ",
    "global_before_start": r"thread \(63,0,0\): out of bounds: read of 4 bytes, 4 bytes before the start of buffer 0",
    "shared_off_by_one": r"thread \(63,0,0\): out of bounds: write of 4 bytes at byte 256 of 256 bytes of dynamic",
    "static_off_by_one": r"thread \(63,0,0\): index outside the declared array",
    "register_off_by_one": r"index outside the declared array",
    "uninitialised_shared": r"thread \(58,0,0\): read of dynamic shared memory at byte 20, which nothing has written",
    "write_to_input": r"write to buffer 0, which is read-only",
    "misaligned_vector": r"misaligned or null address",
    "two_blocks": r"block \(1,0,0\): .* write to buffer 1 .* another block's write",
    "blocks_exchange": r"block \(1,0,0\): .* read of buffer 1 .* another block's write",
    "index_overflow": r"integer overflow",
    "invalid_launch": r"too_much_shared_kernel: invalid launch: .* 204800 bytes",
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found_and_the_kernel_without_it_passes(library, name):
    x, out = torch.randn(64), torch.full((64,), torch.nan)
    library.call(name, x, out, 0, written=(1,))
    assert torch.equal(out, x.flip(0))
    with pytest.raises(RuntimeError, match=BUGS[name]) as caught:
        library.call(name, x, out, 1, written=(1,))
    assert "kernel " in str(caught.value)
    library.call(name, x, out.fill_(torch.nan), 0, written=(1,))  # and the machine goes on
    assert torch.equal(out, x.flip(0))


def test_messages_name_the_line(library):
    line = next(
        n
        for n, text in enumerate((PLANTED / "planted.cu").read_text().splitlines(), 1)
        if "i + bug] = in[63 - i]" in text
    )
    with pytest.raises(RuntimeError, match=f"planted.cu:{line}"):
        library.call("global_off_by_one", torch.randn(64), torch.empty(64), 1, written=(1,))


def test_shuffles_and_shared_memory(library):
    x, total, running = torch.randn(3, 128), torch.empty(3), torch.empty(3, 128)
    library.call("sums", x, total, running, 3, written=(1, 2))
    torch.testing.assert_close(total, x.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running, x.cumsum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("to_half", torch.float16), ("to_bfloat16", torch.bfloat16)])
def test_half_conversions_are_torchs(library, name, dtype):
    every = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()  # each number of the type
    between = torch.randn(5000) * torch.logspace(-45, 39, 5000)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65504.0, 65519.99, 65520.0, 6e-8, 2.9e-8, 3.4e38])
    x = torch.cat([every[~every.isnan()], (every + every.nextafter(torch.tensor(torch.inf))) / 2, between, special])
    x = x[~x.isnan()]
    narrowed, back = torch.empty(x.numel(), dtype=dtype), torch.empty(x.numel())
    library.call(name, x, narrowed, back, x.numel(), written=(1, 2))
    assert torch.equal(narrowed.view(torch.int16), x.to(dtype).view(torch.int16))
    assert torch.equal(back, x.to(dtype).float())


@pytest.mark.parametrize("n", [0, 3, 4, 381, 384])
def test_vectors(library, n):
    x, out = torch.randn(n), torch.empty(n)
    library.call("vectors", x, out, n, written=(1,))
    assert torch.equal(out, 2 * x)


def test_votes(library):
    x = torch.randn(70)
    x[32:64] = 1.0
    ballots, any_all = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    library.call("votes", x, ballots, any_all, written=(1, 2))
    for warp, values in enumerate(x.split(32)):
        bits = sum(1 << lane for lane, value in enumerate(values.tolist()) if value > 0)
        assert ballots[warp].item() & 0xFFFFFFFF == bits
        assert any_all[warp] == 2 * bool((values > 0).all()) + bool((values > 0).any())


def test_exchanges(library):
    x, pairs, sums = torch.randn(32), torch.empty(32), torch.empty(32)
    library.call("exchange", x, pairs, sums, written=(1, 2))
    assert torch.equal(pairs[:16], x[:16].view(8, 2).flip(1).flatten())
    assert torch.equal(pairs[16:], torch.cat([x[19].expand(8), x[27].expand(8)]))
    torch.testing.assert_close(sums, (x * torch.tensor([1.0, 2.0]).repeat(16)).sum().expand(32))


def test_launches_are_counted(library):
    library.call("vectors", torch.randn(4), torch.empty(4), 4, written=(1,))
    assert "vectors_kernel" in library.launched()
