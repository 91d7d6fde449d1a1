"""mamba-ssm's names on anima_fast: signatures as recorded from the original, results against the fp64 reference."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import anima_fast
from anima_fast.integrations import compat
from anima_fast.integrations.compat import mamba_ssm

INF = float("inf")
# (parameter, default) in order; read in state-spaces/mamba e9594ce (2.3.2.post1)
SIGNATURES = {
    "mamba_chunk_scan_combined": (
        "x dt A B C chunk_size",
        dict(D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False)
        | dict(dt_limit=(0.0, INF), return_final_states=False, return_varlen_states=False, state_dtype=None),
    ),
    "mamba_split_conv1d_scan_combined": (
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size",
        dict(initial_states=None, seq_idx=None, dt_limit=(0.0, INF), return_final_states=False, activation="silu")
        | dict(rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None)
        | dict(ngroups=1, norm_before_gate=True, state_dtype=None),
    ),
    "selective_state_update": (
        "state x dt A B C",
        dict(D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None),
    ),
    "rmsnorm_fn": ("x weight bias", dict(z=None, eps=1e-6, group_size=None, norm_before_gate=True)),
    "RMSNorm": ("hidden_size", dict(eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None)),
}


def assert_signature(function, names: str, defaults: dict):
    """The parameters, in order, with their defaults; `**` marks one that takes further keywords."""
    given = []
    for p in inspect.signature(function).parameters.values():
        given.append(("**" if p.kind is p.VAR_KEYWORD else p.name, p.default))
    empty = inspect.Parameter.empty
    assert given == [(name, empty) for name in names.split()] + list(defaults.items())


def close(got, expected, tolerance=1e-5):
    """Largest error, relative to the largest value."""
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"relative error {error:.3g} at shape {list(got.shape)}"


def to64(kwargs: dict) -> dict:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}


def scan_inputs(batch=2, length=37, heads=4, head_dim=8, groups=2, state=16):
    x = torch.randn(batch, length, heads, head_dim)
    dt = torch.randn(batch, length, heads)
    A = -torch.rand(heads) - 0.1
    B, C = torch.randn(2, batch, length, groups, state)
    return x, dt, A, B, C


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert_signature(getattr(mamba_ssm, name), *SIGNATURES[name])


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(D=torch.randn(4), dt_softplus=True, dt_bias=torch.randn(4), dt_limit=(0.1, 1.0)),
        dict(D=torch.randn(4, 8), z=torch.randn(2, 37, 4, 8), initial_states=torch.randn(2, 4, 8, 16)),
        dict(seq_idx=torch.arange(37).div(10, rounding_mode="floor").int().expand(2, -1)),
        dict(cu_seqlens=torch.tensor([0, 5]), state_dtype=torch.bfloat16),  # the bounds do not count here
    ],
    ids=["plain", "dt", "D z initial", "seq_idx", "cu_seqlens"],
)
def test_chunk_scan(options):
    inputs = scan_inputs()
    y, final = mamba_ssm.mamba_chunk_scan_combined(*inputs, 16, return_final_states=True, **options)
    assert torch.equal(y, mamba_ssm.mamba_chunk_scan_combined(*inputs, 16, **options))
    options.pop("cu_seqlens", None)
    expected, expected_final = anima_fast.ssd_chunk_scan(
        *(t.double() for t in inputs), return_final_states=True, backend="reference", **to64(options)
    )
    close(y, expected)
    close(final, expected_final)
    assert final.dtype == torch.float32


def test_chunk_scan_varlen_states():
    inputs = scan_inputs(batch=1)
    bounds = torch.tensor([0, 9, 10, 37], dtype=torch.int32)
    y, final, states = mamba_ssm.mamba_chunk_scan_combined(
        *inputs, 16, dt_softplus=True, cu_seqlens=bounds, return_final_states=True, return_varlen_states=True
    )
    two = mamba_ssm.mamba_chunk_scan_combined(
        *inputs, 16, dt_softplus=True, cu_seqlens=bounds, return_varlen_states=True
    )
    assert len(two) == 2 and torch.equal(two[1], states)
    assert y.shape == inputs[0].shape and final.shape == (1, 4, 8, 16)
    for i, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        x, dt, A, B, C = inputs
        alone = [t[:, start:end].double() for t in (x, dt, B, C)]
        _, expected = anima_fast.ssd_chunk_scan(
            alone[0], alone[1], A.double(), *alone[2:], dt_softplus=True, return_final_states=True, backend="reference"
        )
        close(states[i], expected[0])


@pytest.mark.parametrize("heads", [None, 4])
def test_state_update(heads):
    """With the heads dimension and without, all arguments, states in a larger pool."""
    batch, dim, n, slots = 3, 8, 16, 5
    h = () if heads is None else (heads,)
    state = torch.randn(slots, *h, dim, n)
    x, dt, z = torch.randn(3, batch, *h, dim)
    A = -torch.rand(*h, dim, n)
    B, C = torch.randn(2, batch, *(() if heads is None else (2,)), n)
    D, dt_bias = torch.randn(2, *h, dim)
    slot = torch.tensor([4, -1, 0], dtype=torch.int32)
    before = state.clone()
    arguments = (x, dt, A, B, C, D, z, dt_bias)
    out = mamba_ssm.selective_state_update(state, *arguments, dt_softplus=True, state_batch_indices=slot)

    def grouped(t):  # B and C for each head
        return t[:, None] if heads is None else t.repeat_interleave(heads // 2, dim=1)[:, :, None]

    step = F.softplus(dt.double() + dt_bias.double())[..., None]
    expected = before.double()[slot] * torch.exp(step * A.double()) + step * x.double()[..., None] * grouped(B).double()
    expected_out = (expected * grouped(C).double()).sum(-1) + D.double() * x.double()
    expected_out = expected_out * F.silu(z.double())
    for row in (0, 2):
        close(out[row], expected_out[row])
        close(state[slot[row]], expected[row])
    assert not out[1].any(), "a row of padding gives 0"
    assert torch.equal(state[1:4], before[1:4]), "other slots are left alone"


def test_state_update_continues_the_scan():
    inputs = scan_inputs(length=20)
    x, dt, A, B, C = inputs
    y, final = mamba_ssm.mamba_chunk_scan_combined(*inputs, 16, dt_softplus=True, return_final_states=True)
    cut = [t[:, :19] for t in (x, dt)] + [A] + [t[:, :19] for t in (B, C)]
    _, state = mamba_ssm.mamba_chunk_scan_combined(*cut, 16, dt_softplus=True, return_final_states=True)
    out = mamba_ssm.selective_state_update(
        state,
        x[:, 19],
        dt[:, 19, :, None].expand(-1, -1, 8),
        A[:, None, None].expand(-1, 8, 16),
        B[:, 19],
        C[:, 19],
        dt_softplus=True,
    )
    close(out, y[:, 19])
    close(state, final)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("feed_forward", [0, 6])
@pytest.mark.parametrize("norm", [True, False])
def test_split_conv1d_scan(norm, feed_forward, groups, norm_before_gate):
    batch, length, heads, head_dim, n, width = 2, 21, 4, 8, 16, 4
    inner, conv_dim = heads * head_dim, heads * head_dim + 2 * groups * n
    zxbcdt = torch.randn(batch, length, 2 * feed_forward + inner + conv_dim + heads)
    weight, bias = torch.randn(conv_dim, width), torch.randn(conv_dim)
    dt_bias, A, D = torch.randn(heads), -torch.rand(heads), torch.randn(heads)
    rmsnorm_weight = torch.randn(inner) if norm else None
    projection, projection_bias = torch.randn(5, feed_forward + inner), torch.randn(5)
    initial = torch.randn(batch, heads, head_dim, n)
    out, final = mamba_ssm.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 16, initial, dt_limit=(0.05, 3.0), return_final_states=True,
        rmsnorm_weight=rmsnorm_weight, rmsnorm_eps=1e-3, outproj_weight=projection, outproj_bias=projection_bias,
        headdim=head_dim, ngroups=groups, norm_before_gate=norm_before_gate,
    )  # fmt: skip

    ff, z, xBC, dt = zxbcdt.double().split([2 * feed_forward, inner, conv_dim, heads], dim=-1)
    xBC = F.conv1d(F.pad(xBC.mT, (width - 1, 0)), weight.double()[:, None], bias.double(), groups=conv_dim)
    x, B, C = F.silu(xBC).mT.split([inner, groups * n, groups * n], dim=-1)
    y, expected_final = anima_fast.ssd_chunk_scan(
        x.unflatten(-1, (heads, head_dim)), dt, A.double(), B.unflatten(-1, (groups, n)), C.unflatten(-1, (groups, n)),
        D=D.double(), dt_bias=dt_bias.double(), initial_states=initial.double(), dt_softplus=True,
        dt_limit=(0.05, 3.0), return_final_states=True, backend="reference",
    )  # fmt: skip
    expected = y.flatten(2)
    if norm:
        gated = expected if norm_before_gate else expected * F.silu(z)
        per_group = gated.unflatten(-1, (groups, -1))
        expected = F.rms_norm(per_group, per_group.shape[-1:], eps=1e-3).flatten(-2) * rmsnorm_weight.double()
    if not norm or norm_before_gate:
        expected = expected * F.silu(z)
    if feed_forward:
        expected = torch.cat([F.silu(ff[..., :feed_forward]) * ff[..., feed_forward:], expected], dim=-1)
    close(out, F.linear(expected, projection.double(), projection_bias.double()))
    close(final, expected_final)


def test_split_conv1d_scan_packed_and_minimal():
    """Two sequences packed by seq_idx are the two alone; D of (H, P) instead of headdim; no projection, no norm."""
    heads, head_dim, n = 4, 8, 16
    conv_dim = heads * head_dim + 2 * n
    zxbcdt = torch.randn(1, 30, heads * head_dim + conv_dim + heads)
    rest = (torch.randn(conv_dim, 4), None, torch.randn(heads), -torch.rand(heads), torch.randn(heads, head_dim), 16)
    seq_idx = torch.tensor([0] * 11 + [1] * 19, dtype=torch.int32)[None]
    packed = mamba_ssm.mamba_split_conv1d_scan_combined(zxbcdt, *rest, seq_idx=seq_idx)
    for part in (slice(0, 11), slice(11, 30)):
        close(packed[:, part], mamba_ssm.mamba_split_conv1d_scan_combined(zxbcdt[:, part], *rest))


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(headdim=None), "headdim"),
        (dict(conv1d_weight=torch.randn(63, 4)), "conv1d_weight"),
        (dict(zxbcdt=torch.randn(1, 5, 101)), "zxbcdt"),
        (dict(outproj_bias=torch.randn(3)), "outproj_bias"),
    ],
)
def test_split_conv1d_scan_refuses(change, named):
    arguments = dict(zxbcdt=torch.randn(1, 5, 100), conv1d_weight=torch.randn(64, 4), conv1d_bias=None)
    arguments |= dict(dt_bias=torch.randn(4), A=-torch.rand(4), D=torch.randn(4), chunk_size=16, headdim=8)
    mamba_ssm.mamba_split_conv1d_scan_combined(**arguments)
    with pytest.raises(ValueError, match=f"^{named}: got"):
        mamba_ssm.mamba_split_conv1d_scan_combined(**(arguments | change))


def test_rmsnorm_is_a_module_with_a_weight_and_gradients():
    norm = mamba_ssm.RMSNorm(12, group_size=6, norm_before_gate=False)
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    x, z = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    norm(x, z).sum().backward()
    assert norm.weight.grad.abs().sum() > 0
    gated = (x * F.silu(z)).unflatten(-1, (2, 6))
    close(norm(x, z).detach(), F.rms_norm(gated, (6,), eps=1e-5).flatten(-2))
    assert mamba_ssm.rmsnorm_fn(x.bfloat16(), norm.weight, None).dtype == torch.bfloat16


# compat.install, in processes of their own: it changes what can be imported

IMPORT_LINES = """
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
"""


def run(script: str, path=None) -> subprocess.CompletedProcess:
    program = f"import sys; sys.path[:0] = {[str(path)] if path else []}\n{script}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(any(map(importlib.util.find_spec, compat.VERSIONS)), reason="an original is installed")
def test_install_makes_the_original_imports_work():
    done = run(
        f"""
import importlib, importlib.util, importlib.metadata
from anima_fast.integrations import compat
assert "anima_fast.integrations.compat.fla" not in sys.modules, "nothing is loaded before it is asked for"
assert compat.install() == compat.install() == ("causal_conv1d", "fla", "mamba_ssm")
{IMPORT_LINES}
from anima_fast.integrations.compat import causal_conv1d, fla, mamba_ssm
assert mamba_chunk_scan_combined is mamba_ssm.mamba_chunk_scan_combined
assert fused_recurrent_gated_delta_rule is fla.fused_recurrent_gated_delta_rule
assert causal_conv1d_update is causal_conv1d.causal_conv1d_update

import mamba_ssm as package
assert package.__version__ == "2.3.2.post1+anima.fast"
assert package.ops.triton.ssd_combined.mamba_chunk_scan_combined is mamba_chunk_scan_combined
for name in ("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "fla", "causal_conv1d"):
    assert importlib.util.find_spec(name).loader is sys.modules[name].__loader__
importlib.reload(package)
for line in ("from mamba_ssm import Mamba2", "import fla.modules", "import mamba_ssm.distributed"):
    try:
        exec(line)
    except ImportError as error:
        assert "mamba_ssm" in str(error) or "fla" in str(error)
    else:
        raise AssertionError(line)
try:
    importlib.metadata.version("mamba_ssm")
except importlib.metadata.PackageNotFoundError:
    pass

compat.uninstall()
compat.uninstall()
assert importlib.util.find_spec("mamba_ssm") is None and "fla.ops" not in sys.modules
try:
    from causal_conv1d import causal_conv1d_fn
except ModuleNotFoundError:
    pass
assert compat.install("fla") == ("fla",)
assert importlib.util.find_spec("mamba_ssm") is None
"""
    )
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2, "one line for each install that did something"
    assert "mamba_ssm, fla, causal_conv1d" in lines[0]


def test_install_leaves_an_installed_package_alone(tmp_path):
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("mine = True\n")
    run(
        """
from anima_fast.integrations import compat
assert "fla" not in compat.install()
import fla
assert fla.mine
try:
    import fla.ops
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the installed fla got a module of ours")
""",
        tmp_path,
    )


def test_install_refuses_a_name_it_does_not_know():
    with pytest.raises(ValueError, match="packages: got 'flash_attn'"):
        compat.install("flash_attn")
