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


def build(driver: str, flags: str, folder: Path) -> Path:
    """The driver and every source of csrc/cpu, compiled with `flags` two at a time."""
    common = f"-std=c++17 -O1 -g -fno-omit-frame-pointer {flags} {'-DANIMA_X86=1' if X86 else ''}".split()
    sources = [ROOT / "tests/cpp" / driver, *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    if not X86:
        sources = [s for s in sources if not s.stem.endswith(tuple(ISA_FLAGS))]

    def compile_one(source: Path) -> Path:
        isa = next((f for suffix, f in ISA_FLAGS.items() if source.stem.endswith(suffix)), "").split()
        target = folder / f"{source.stem}_{source.parent.name}.o"
        run([COMPILER, *common, *isa, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "program"
    run([COMPILER, *common, *map(str, objects), "-o", str(program)])
    return program


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        pytest.param("-fsanitize=address,undefined -fno-sanitize-recover=all -fopenmp", 400, id="address,undefined"),
        pytest.param("-fsanitize=thread", 120, id="thread"),
    ],
)
def test_regional_attention(flags, calls, tmp_path):
    program = build("regional_attention.cpp", flags, tmp_path)
    # OpenMP's thread pool lives until exit, which LeakSanitizer would report.
    out = run([str(program), str(calls)], env={"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"})
    assert "passed" in out


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
