"""What is installed, what importing it costs, and (slow) what the sdist and the wheels contain."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import anima_fast

PACKAGE = Path(anima_fast.__file__).parent
ROOT = Path(__file__).parents[1]

# Optional at run time or heavy: nobody pays for them before using what needs them.
NOT_AT_IMPORT = (
    "anima_fast._C",
    "anima_fast.cli",
    "anima_fast.kernels",
    "comfy",
    "diffusers",
    "matplotlib",
    "PIL",
    "safetensors",
    "tqdm",
    "transformers",
    "triton",
    "xformers",
)


def run(*command, cwd, **env):
    """Runs a command with the environment changed by `env` (None removes); the failure shows its output."""
    merged = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=merged, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} in {cwd} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_import_pulls_in_nothing_that_torch_does_not():
    # torch imports some of these itself in some versions; what counts is what we add.
    script = (
        "import sys, torch; before = set(sys.modules); import anima_fast\n"
        f"print(sorted(m for m in set(sys.modules) - before if m.startswith({NOT_AT_IMPORT!r})))"
    )
    added = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert added.strip() == "[]", f"import anima_fast also imports {added}"


def test_typed_marker_is_installed():
    assert (PACKAGE / "py.typed").is_file()


def test_version_has_one_source():
    assert importlib.metadata.version("anima-fast") == anima_fast.__version__


def test_kernels_are_a_subpackage():
    assert importlib.util.find_spec("anima_fast.kernels") is not None


def test_build_record_agrees_with_the_extension():
    record = json.loads((PACKAGE / "_build.json").read_text(encoding="utf-8"))
    assert set(record) == {"extension", "reason", "compiler", "isa", "openmp", "flags", "cuda"}
    assert record["extension"] == (importlib.util.find_spec("anima_fast._C") is not None)
    assert (record["reason"] is None) == record["extension"], "exactly a missing extension has a reason"
    if record["extension"]:
        assert "baseline" in record["isa"] and record["compiler"]
        assert "-march=native" not in str(record["flags"]) and "fast-math" not in str(record["flags"])
        cuda = record["cuda"]
        assert (cuda["reason"] is None) == cuda["built"] == bool(cuda["archs"]), "kernels, or the reason for none"
        assert hasattr(importlib.import_module("anima_fast._C").SsdChunkScan, "cuda") == cuda["built"]


def test_installed_command():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="anima-fast")
    assert {script.value for script in scripts} == {"anima_fast.cli:main"}


# --- What the builds contain. Each builds a copy of the tree with this environment's build requirements.


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree without anything built."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests run away from the source tree")
    for module in ("build", "ninja", "pybind11"):
        pytest.importorskip(module)
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_build.json", "_C.*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build_wheel(tree, out, **env):
    unset = (
        "CC",
        "CXX",
        "ANIMA_FAST_NO_EXT",
        "ANIMA_FAST_REQUIRE_EXT",
        "ANIMA_FAST_NO_CUDA",
        "ANIMA_FAST_REQUIRE_CUDA",
    )
    env = {**dict.fromkeys(unset), "ANIMA_FAST_CUDA_ARCHS": "80", **env}
    log = run(sys.executable, "-m", "build", "-w", "-n", "-o", out, ".", cwd=tree, **env)
    (wheel,) = out.glob("*.whl")
    return wheel, log


@pytest.mark.slow
def test_sdist_has_what_building_testing_and_measuring_need(tree, tmp_path):
    run(sys.executable, "-m", "build", "-s", "-n", "-o", tmp_path, ".", cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        file.relative_to(tree).as_posix()
        for folder in ("anima_fast", "bindings", "csrc", "kernels", "benchmarks", "tests", "examples")
        for file in (tree / folder).rglob("*")
        if file.is_file() and file.name != "_build.json" and file.suffix not in (".so", ".pyd", ".pyc")
    }
    wanted |= {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "constraints.txt"}
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyd", "_build.json"))]


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """A wheel with the extension, unpacked; and the path of the wheel."""
    out = tmp_path_factory.mktemp("wheel")
    path, log = build_wheel(tree, out)
    unpacked = out / "unpacked"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(unpacked)
    record = json.loads((unpacked / "anima_fast/_build.json").read_text(encoding="utf-8"))
    if not record["extension"]:
        pytest.skip(f"no extension can be built here: {record['reason']}")
    return path, unpacked, log


def extensions(unpacked):
    return [file for file in (unpacked / "anima_fast").glob("_C.*") if file.suffix in (".so", ".pyd")]


@pytest.mark.slow
def test_wheel_with_the_extension(wheel):
    path, unpacked, _ = wheel
    assert not path.name.endswith("-none-any.whl")
    assert len(extensions(unpacked)) == 1
    for file in ("py.typed", "kernels/__init__.py", "kernels/regional_attention.py", "cli.py"):
        assert (unpacked / "anima_fast" / file).is_file(), file
    assert {p.name for p in unpacked.iterdir() if not p.name.endswith(".dist-info")} == {"anima_fast"}
    record = json.loads((unpacked / "anima_fast/_build.json").read_text(encoding="utf-8"))
    assert record["cuda"]["archs"] == (["sm_80", "compute_80"] if record["cuda"]["built"] else [])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("ldd"), reason="ldd is a Linux tool")
def test_extension_depends_on_no_torch(wheel):
    libraries = run("ldd", *extensions(wheel[1]), cwd=wheel[1])
    assert not re.search(r"libtorch|libc10|libcuda", libraries), libraries


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
def test_wide_instructions_cannot_reach_a_machine_without_them(wheel, tree):
    """No file compiled for AVX exports an inline function of ours (or of anyone) as a weak symbol.

    The linker keeps one copy of a weak symbol, from any file. If that is the AVX-512 copy, the portable path
    executes it and dies of an illegal instruction on a machine without AVX-512. Hence: what the per-ISA files
    define is in a namespace of its own instruction set, or static.
    """
    objects = [file for file in (tree / "build").rglob("*.o") if re.search(r"_(avx2|avx512)\.cpp\.o$", file.name)]
    if not objects:
        pytest.skip("no per-instruction-set files on this machine")
    symbols = {
        file: set(re.findall(r"^[0-9a-f]+ [VWu] (.+)$", run("nm", "-C", "--defined-only", file, cwd=tree), re.M))
        for file in (tree / "build").rglob("*.o")
    }
    for file in objects:
        others = set().union(*(names for other, names in symbols.items() if other != file))
        assert not symbols[file] & others, f"{file.name} shares inline functions with other files"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CC": "/nonexistent"}, "'/nonexistent' does not run"),
        ({"ANIMA_FAST_NO_EXT": "1"}, "left out on request"),
    ],
    ids=["no compiler", "on request"],
)
def test_wheel_without_the_extension(tree, tmp_path, env, reason):
    path, log = build_wheel(tree, tmp_path, **env)
    assert path.name.endswith("-py3-none-any.whl")
    assert reason in log
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
        record = json.loads(archive.read("anima_fast/_build.json"))
    assert record["extension"] is False
    assert reason in record["reason"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="without nvcc there is one kind of wheel")
def test_wheel_without_cuda(wheel, tree, tmp_path):
    """What keeps the kernels from being built leaves the rest as it was and is named."""
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("*.egg-info"))  # with the objects that are there already
    (copy / "csrc/cuda/ssd_chunk_scan.cu").write_text("int broken = ;\n")
    cases = {
        "left out on request": {"ANIMA_FAST_NO_CUDA": "1"},
        "got '1 80'; nvcc": {"ANIMA_FAST_CUDA_ARCHS": "1 80"},
        "compiling the CUDA sources failed: csrc/cuda/ssd_chunk_scan.cu(1): error": {},
    }
    for number, (reason, env) in enumerate(cases.items()):
        path, log = build_wheel(copy, tmp_path / str(number), **env)
        with zipfile.ZipFile(path) as archive:
            record = json.loads(archive.read("anima_fast/_build.json"))
        assert record["extension"] and not record["cuda"]["built"]
        assert reason in record["cuda"]["reason"] and reason in log
    with pytest.raises(AssertionError, match="ANIMA_FAST_REQUIRE_CUDA is set, but .* left out"):
        build_wheel(copy, tmp_path / "required", ANIMA_FAST_NO_CUDA="1", ANIMA_FAST_REQUIRE_CUDA="1")


@pytest.mark.slow
def test_source_that_does_not_compile_is_reported(tree, tmp_path):
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (broken / "bindings/module.cpp").write_text("int broken = ;\n")
    path, log = build_wheel(broken, tmp_path, ANIMA_FAST_NO_CUDA="1")
    with zipfile.ZipFile(path) as archive:
        record = json.loads(archive.read("anima_fast/_build.json"))
    if record["compiler"] is None:
        pytest.skip(f"no compiler here: {record['reason']}")
    assert path.name.endswith("-py3-none-any.whl")
    assert "bindings/module.cpp:1" in log, "the compiler's own message is printed"
    assert "compiling the C++ sources failed: bindings/module.cpp:1" in record["reason"]
    with pytest.raises(AssertionError, match="ANIMA_FAST_REQUIRE_EXT is set, but compiling"):
        build_wheel(broken, tmp_path / "required", ANIMA_FAST_REQUIRE_EXT="1", ANIMA_FAST_NO_CUDA="1")
