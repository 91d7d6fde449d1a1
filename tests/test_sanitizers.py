"""The C++ kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

tests/cpp/*.cpp drive the very files of csrc/cpu without Python. ThreadSanitizer cannot follow OpenMP, so its
build starts threads of its own (csrc/cpu/parallel_for.cpp).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {"_avx2": "-mavx2 -mfma -mf16c", "_avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ or clang++")


def compile_objects(sources: list[Path], flags: str, folder: Path) -> list[Path]:
    """Two at a time."""
    common = f"-std=c++17 -O1 -g -fno-omit-frame-pointer {flags} {'-DANIMA_X86=1' if X86 else ''}".split()

    def compile_one(source: Path) -> Path:
        isa = next((f for suffix, f in ISA_FLAGS.items() if source.stem.endswith(suffix)), "").split()
        target = folder / f"{source.stem}_{source.parent.name}.o"
        run([COMPILER, *common, *isa, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            # Null and object size are AddressSanitizer's already; without them the kernels compile in half the time.
            "-fsanitize=address,undefined -fno-sanitize=null,alignment,object-size -fno-sanitize-recover=all -fopenmp",
            id="address,undefined",
        ),
        pytest.param("-fsanitize=thread", id="thread"),
    ],
)
def build(request, tmp_path_factory):
    """A function that makes a program of a driver and every source of csrc/cpu, which are compiled once."""
    folder = tmp_path_factory.mktemp("sanitizers")
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    if not X86:
        sources = [s for s in sources if not s.stem.endswith(tuple(ISA_FLAGS))]
    objects = compile_objects(sources, request.param, folder)

    def link(driver: str) -> Path:
        program = folder / Path(driver).stem
        (main,) = compile_objects([ROOT / "tests/cpp" / driver], request.param, folder)
        run([COMPILER, *request.param.split(), str(main), *map(str, objects), "-o", str(program)])
        return program

    return link


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.mark.parametrize(("driver", "calls"), [("regional_attention.cpp", 240), ("scans.cpp", 200)])
def test_driver(build, driver, calls):
    # OpenMP's thread pool lives until exit, which LeakSanitizer would report.
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    assert "passed" in run([str(build(driver)), str(calls)], env=environment)


def test_the_sanitizers_are_alive(tmp_path):
    """A build with a planted one-too-far write fails, so that a pass above means something."""
    source = tmp_path / "bug.cpp"
    source.write_text(
        "#include <vector>\nint main(int c, char**) { std::vector<int> v(c); v.data()[c] = 1; return 0; }\n"
    )
    program = tmp_path / "bug"
    run([COMPILER, "-fsanitize=address", "-g", str(source), "-o", str(program)])
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
