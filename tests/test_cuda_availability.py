"""What the `cuda` backend says it lacks, in every situation; none of them needs a GPU."""

import re
import types

import pytest
import torch

from anima_fast.ops import cuda


@pytest.fixture
def machine(monkeypatch):
    """A machine that can run the kernels, to take things away from."""

    class SsdChunkScan:
        cuda = None

    def build(**changes):
        given = {
            "missing": None, "extension": types.SimpleNamespace(SsdChunkScan=SsdChunkScan), "reason": None,
            "archs": ["sm_80", "sm_120"], "toolkit": "13.0", "capabilities": [(8, 6)], **changes,
        }  # fmt: skip
        monkeypatch.setattr(cuda, "extension_unavailable", lambda: given["missing"])
        monkeypatch.setattr(cuda, "extension", lambda: given["extension"])
        monkeypatch.setattr(cuda, "build_info", lambda: {"cuda": {k: given[k] for k in ("archs", "reason")}})
        monkeypatch.setattr(torch.version, "cuda", given["toolkit"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(given["capabilities"]))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(given["capabilities"]))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: given["capabilities"][index])
        return cuda.unavailable.__wrapped__()

    return build


def test_available(machine):
    assert machine() is None
    assert machine(capabilities=[(7, 0), (12, 0)]) is None, "one of the cards is enough"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"missing": "no extension"}, "no extension"),
        ({"extension": types.SimpleNamespace(), "reason": "nvcc was not found"}, r"built without CUDA \(nvcc was not"),
        ({"capabilities": []}, "no CUDA device"),
        ({"capabilities": [], "toolkit": None}, "this torch is built without CUDA"),
        ({"capabilities": [(9, 0)]}, "sm_80, sm_120, not for sm_90.*ANIMA_FAST_CUDA_ARCHS"),
    ],
)
def test_the_reason_is_named(machine, changes, reason):
    assert re.search(reason, machine(**changes))


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        (["sm_80"], 80, True),
        (["sm_80"], 86, True),
        (["sm_86"], 80, False),
        (["sm_80"], 90, False),
        (["sm_80", "compute_80"], 120, True),  # through its PTX
        (["sm_75", "compute_75"], 70, False),
        (["sm_100"], 120, False),
        ([], 80, False),
    ],
)
def test_machine_code_serves_its_generation_and_ptx_all_later_ones(archs, capability, served):
    assert cuda._serves(archs, capability) is served
