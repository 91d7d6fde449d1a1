"""Builds the extension `anima_fast._C` with ninja, or records what could not be built and why.

Everything declarative is in pyproject.toml. What needs code:

- One build.ninja over bindings/*.cpp and csrc/cpu/*.cpp: parallel, and header edits rebuild (depfiles).
- The instruction set is chosen at run time, so each file is compiled for exactly one: `*_avx2.cpp` and
  `*_avx512.cpp` with their flags, every other file for the machine's baseline. Never -march=native (a wheel
  must run elsewhere) and never -ffast-math (NaN and -inf carry meaning in the kernels).
- Torch is neither needed to build nor linked: the extension takes raw pointers.
- csrc/cuda/*.cu go into the same extension if nvcc is found (in $CUDA_HOME, $CUDA_PATH or on PATH), as machine
  code for each architecture and PTX of the newest for what comes later. The CUDA runtime is linked statically and
  hidden: torch's may be another version. A machine without a GPU or driver can build and load the result.
- Without a working compiler the package installs pure-Python, without a working nvcc without CUDA kernels.
  anima_fast/_build.json says what happened and why; `anima-fast info` prints it.

Environment:
  ANIMA_FAST_REQUIRE_EXT=1      fail instead of installing without the extension
  ANIMA_FAST_NO_EXT=1           leave the extension out on purpose
  ANIMA_FAST_REQUIRE_CUDA=1     fail instead of installing without CUDA kernels
  ANIMA_FAST_NO_CUDA=1          leave the CUDA kernels out on purpose
  ANIMA_FAST_CUDA_ARCHS="80;89" the architectures to compile for; default: all of CUDA_ARCHS that nvcc knows
  CXX (or CC), CPPFLAGS, CXXFLAGS, LDFLAGS, ARCHFLAGS, NVCC_APPEND_FLAGS      as usual
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError

SOURCES = [p.as_posix() for folder in ("bindings", "csrc/cpu") for p in sorted(Path(folder).glob("*.cpp"))]
CUDA_SOURCES = [p.as_posix() for p in sorted(Path("csrc/cuda").glob("*.cu"))]
CUDA_ARCHS = (75, 80, 86, 89, 90, 100, 120)
MSVC = sys.platform == "win32"

# File-name suffix -> flags. MSVC's /arch:AVX2 includes FMA and F16C.
ISA_FLAGS = {
    "avx2": ["/arch:AVX2"] if MSVC else ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["/arch:AVX512"] if MSVC else ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}

PROBE_BASE = "#include <Python.h>\n#include <optional>\nstd::optional<int> probe() { return 1; }\n"
PROBE_X86 = "#if !defined(__x86_64__) && !defined(_M_X64)\n#error not x86-64\n#endif\n"
PROBE_CUDA = "#include <cuda_runtime.h>\n__global__ void kernel() {}\nvoid probe() { kernel<<<1, 1>>>(); }\n"
PROBE_OPENMP = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"


class Unavailable(Exception):
    """The extension cannot be built here; the message is the reason shown to the user."""


class CudaUnavailable(Exception):
    """The same of the CUDA kernels: the extension is built without them."""


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def isa_of(source: str) -> str:
    return next((isa for isa in ISA_FLAGS if Path(source).stem.endswith(f"_{isa}")), "baseline")


def first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror\b", line)), lines[0] if lines else "no output")


class UnixToolchain:
    """g++, clang++ or whatever $CXX names; compiles with depfiles, links a Python module."""

    def __init__(self) -> None:
        self.command = shlex.split(os.environ.get("CXX", "")) or self._from_cc() or self._on_path()
        try:
            version = subprocess.run([*self.command, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Unavailable(f"the C++ compiler {shlex.join(self.command)!r} does not run ({error})") from None
        self.name = (version.stdout.splitlines() or [self.command[0]])[0]
        self.env = dict(os.environ)
        cppflags, cxxflags, ldflags, archflags = (
            shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CXXFLAGS", "LDFLAGS", "ARCHFLAGS")
        )
        self.cflags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"]
        if "clang" not in self.name:
            # GCC's own AVX-512 header triggers it hundreds of times (GCC bug 105593); clang lacks the option.
            self.cflags.append("-Wno-maybe-uninitialized")
        self.cflags += [*cppflags, *cxxflags, *archflags]
        module = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        self.ldflags = [*module, *ldflags, *archflags]
        self.openmp = ["-fopenmp"]

    @staticmethod
    def _from_cc() -> list[str]:
        """$CC without $CXX: the C++ driver of the same compiler, /opt/bin/gcc-13 -> /opt/bin/g++-13."""
        command = shlex.split(os.environ.get("CC", ""))
        if command:
            names = {"gcc": "g++", "clang": "clang++", "cc": "c++"}
            command[0] = re.sub(r"(?<![a-z])(gcc|clang|cc)(?=(-[\d.]+)?$)", lambda match: names[match[1]], command[0])
        return command

    @staticmethod
    def _on_path() -> list[str]:
        for name in ("c++", "g++", "clang++"):
            if shutil.which(name):
                return [name]
        raise Unavailable("no C++ compiler was found (looked for $CXX, $CC, c++, g++ and clang++)")

    def include(self, path: str, system: bool) -> list[str]:
        return ["-isystem" if system else "-I", path]

    def compile(self, source: str, output: str, flags: list[str]) -> list[str]:
        return [*self.command, *self.cflags, *flags, "-c", source, "-o", output]

    def link(self, objects: list[str], output: str, flags: list[str]) -> list[str]:
        return [*self.command, *objects, *self.ldflags, *flags, "-o", output]

    depfile = (["-MD", "-MF", "$out.d"], {"depfile": "$out.d", "deps": "gcc"})


class MsvcToolchain:
    """cl.exe and link.exe where setuptools finds them (the Visual Studio build tools)."""

    def __init__(self, compiler) -> None:
        try:
            compiler.initialize()
        except BaseError as error:
            raise Unavailable(f"Visual C++ was not found ({error})") from None
        self.command = [compiler.cc]
        self.linker = compiler.linker
        self.name = f"Visual C++ ({compiler.cc})"
        self.env = {**os.environ, "PATH": compiler._paths}
        self.cflags = ["/nologo", "/O2", "/std:c++17", "/EHsc", "/MD", "/DNDEBUG", "/W3", "/utf-8"]
        self.cflags += [f"/I{path}" for path in compiler.include_dirs]
        libraries = [*compiler.library_dirs, str(Path(sys.base_prefix) / "libs")]
        self.ldflags = ["/nologo", "/DLL", "/INCREMENTAL:NO", *(f"/LIBPATH:{path}" for path in libraries)]
        self.openmp = ["/openmp"]

    def include(self, path: str, system: bool) -> list[str]:
        return [f"/I{path}"]

    def compile(self, source: str, output: str, flags: list[str]) -> list[str]:
        return [*self.command, *self.cflags, *flags, "/c", source, f"/Fo{output}"]

    def link(self, objects: list[str], output: str, flags: list[str]) -> list[str]:
        # /openmp is a compiler flag only: the objects themselves name vcomp.lib.
        return [self.linker, *objects, *self.ldflags, f"/OUT:{output}"]

    depfile = (["/showIncludes"], {"deps": "msvc"})


def probe(toolchain, source: str, flags: list[str], nvcc=None) -> str | None:
    """Compiles and links a small file. None if that works, else the first error."""
    with tempfile.TemporaryDirectory() as folder:
        file, obj, out = (
            str(Path(folder) / name) for name in ("probe.cu" if nvcc else "probe.cpp", "probe.o", "probe.so")
        )
        Path(file).write_text(source)
        compile_command = nvcc.compile(file, obj, []) if nvcc else toolchain.compile(file, obj, flags)
        for command in (compile_command, toolchain.link([obj], out, flags)):
            done = subprocess.run(command, env=toolchain.env, capture_output=True, text=True, cwd=folder)
            if done.returncode:
                return first_error(done.stdout + done.stderr)
    return None


class Nvcc:
    """nvcc over the toolchain's own C++ compiler; the toolchain links what it makes."""

    def __init__(self, toolchain) -> None:
        if enabled("ANIMA_FAST_NO_CUDA"):
            raise CudaUnavailable("left out on request (ANIMA_FAST_NO_CUDA is set)")
        if not CUDA_SOURCES:
            raise CudaUnavailable("there are no CUDA sources")
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        found = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes] + [shutil.which("nvcc")]
        self.path = next(filter(None, found), None)
        if self.path is None:
            raise CudaUnavailable("nvcc was not found (looked in $CUDA_HOME, $CUDA_PATH and on PATH)")
        self.env = toolchain.env
        release = re.search(r"release ([\d.]+)", self._run("--version"))
        self.name = f"nvcc {release[1] if release else 'of an unknown release'} ({self.path})"
        self.archs = self._archs({int(n) for n in re.findall(r"compute_(\d+)(?!\w)", self._run("--list-gpu-arch"))})

        newest = self.archs[-1]
        self.code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        self.code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        self.cflags = ["-O3", "-std=c++17", "-DNDEBUG", "--threads", "1"]
        if MSVC:
            self.cflags += ["-Xcompiler", "/MD,/EHsc,/utf-8"]
        else:
            # Not with what precedes it ("ccache g++"): nvcc takes one program.
            compiler = next(word for word in reversed(toolchain.command) if not word.startswith("-"))
            self.cflags += ["-ccbin", compiler, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        # nvcc knows where its runtime library is; it says so when asked what it would do.
        folders = re.findall(r'"(?:-L|/LIBPATH:)([^"]+)"', self._run("--dryrun", "-c", "probe.cu", "-o", "probe.o"))
        if MSVC:
            self.ldflags = [*(f"/LIBPATH:{folder}" for folder in folders), "cudart_static.lib"]
        else:
            self.ldflags = [*(f"-L{folder}" for folder in folders), "-lcudart_static", "-lpthread", "-ldl"]
            if sys.platform == "linux":
                self.ldflags += ["-lrt", "-Wl,--exclude-libs,libcudart_static.a"]

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self.path, *arguments], env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise CudaUnavailable(f"{self.path} does not run: {first_error(done.stdout + done.stderr)}")
        return done.stdout + done.stderr

    def _archs(self, known: set[int]) -> list[int]:
        asked = os.environ.get("ANIMA_FAST_CUDA_ARCHS", "")
        archs = re.split(r"[;,\s]+", asked.strip()) if asked.strip() else [str(arch) for arch in CUDA_ARCHS]
        unknown = [arch for arch in archs if not arch.isdecimal() or int(arch) not in known]
        if asked.strip() and unknown:
            allowed = " ".join(map(str, sorted(known)))
            raise CudaUnavailable(f"ANIMA_FAST_CUDA_ARCHS: got {asked!r}; {self.name} knows {allowed}")
        return sorted({int(arch) for arch in archs if arch not in unknown})

    def compile(self, source: str, output: str, flags: list[str]) -> list[str]:
        return [self.path, *self.cflags, *flags, "-c", source, "-o", output]

    depfile = (["-MD", "-MF", "$out.d"], {"depfile": "$out.d", "deps": "gcc"})


class BuildExtension(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace:
            # Editable installs get a fresh temporary folder from setuptools; a kept one makes the next build
            # incremental. Not shared with isolated builds, whose pybind11 has another path every time.
            self.build_temp = str(Path("build") / f"inplace-{self.plat_name}-{sys.implementation.cache_tag}")

    def run(self) -> None:
        self.record = {
            "extension": False, "reason": None, "compiler": None, "isa": [], "openmp": False, "flags": {},
            "cuda": {"built": False, "reason": None, "compiler": None, "archs": [], "flags": None},
        }  # fmt: skip
        super().run()
        for package in self._package_dirs():
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build.json").write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
            if not self.record["extension"]:
                # One left by an earlier build would be imported, or packed into a wheel tagged as pure.
                (package / Path(self.get_ext_filename("anima_fast._C")).name).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        try:
            if enabled("ANIMA_FAST_NO_EXT"):
                raise Unavailable("left out on request (ANIMA_FAST_NO_EXT is set)")
            self._build()
        except Unavailable as error:
            self.record["reason"] = str(error)
            for variable in ("ANIMA_FAST_REQUIRE_CUDA", "ANIMA_FAST_REQUIRE_EXT"):
                if enabled(variable):
                    raise CompileError(f"{variable} is set, but {error}") from None
            line = "=" * 80
            print(
                f"{line}\nanima-fast is being installed without its C++ extension (pure Python):\n  {error}\n"
                "The `cpu` backend is not available; the other backends are. To have it, see to the above\n"
                f"(it takes a C++17 compiler and the Python headers) and install anima-fast again.\n{line}",
                file=sys.stderr,
            )
            # What is left is a pure package: wheel tag, install location and copy steps follow from this.
            self.extensions = []
            self.distribution.ext_modules = None

    def _build(self) -> None:
        toolchain = MsvcToolchain(self.compiler) if MSVC else UnixToolchain()
        self.record["compiler"] = toolchain.name

        python = toolchain.include(sysconfig.get_path("include"), system=True)
        if error := probe(toolchain, PROBE_BASE, python):
            hint = " (install the Python headers: python3-dev or python3-devel)" if "Python.h" in error else ""
            raise Unavailable(f"{toolchain.name} cannot build a C++17 Python module: {error}{hint}")
        openmp = [] if probe(toolchain, PROBE_OPENMP, toolchain.openmp) else toolchain.openmp
        x86 = probe(toolchain, PROBE_X86, []) is None

        import pybind11

        common = [*toolchain.include("csrc", system=False), *python]
        common += toolchain.include(pybind11.get_include(), system=True) + openmp
        common += ["-DANIMA_X86=1"] if x86 else []
        sources = [source for source in SOURCES if x86 or isa_of(source) == "baseline"]
        flags = {isa: ISA_FLAGS.get(isa, []) for isa in sorted({isa_of(source) for source in sources})}
        rules = {isa: toolchain.compile("@in@", "@out@", [*common, *isa_flags]) for isa, isa_flags in flags.items()}

        try:
            nvcc = Nvcc(toolchain)
            if error := probe(toolchain, PROBE_CUDA, nvcc.ldflags, nvcc):
                raise CudaUnavailable(f"{nvcc.name} with {toolchain.name} cannot build a CUDA library: {error}")
            library = self._ninja(toolchain, rules, sources, openmp, nvcc)
            archs = [f"sm_{arch}" for arch in nvcc.archs] + [f"compute_{nvcc.archs[-1]}"]
            self.record["cuda"].update(built=True, compiler=nvcc.name, archs=archs, flags=shlex.join(nvcc.cflags))
        except CudaUnavailable as error:
            self.record["cuda"]["reason"] = str(error)
            if enabled("ANIMA_FAST_REQUIRE_CUDA"):
                raise Unavailable(f"it would have no CUDA kernels: {error}") from None
            print(f"anima-fast is being built without its CUDA kernels: {error}", file=sys.stderr)
            library = self._ninja(toolchain, rules, sources, openmp, None)

        target = Path(self.build_lib) / self.get_ext_filename("anima_fast._C")
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not new contents: a process that has the old one mapped keeps running.
        target.unlink(missing_ok=True)
        shutil.copy2(library, target)
        self.record.update(
            extension=True,
            isa=list(flags),
            openmp=bool(openmp),
            flags={isa: " ".join([*toolchain.cflags, *openmp, *f]) for isa, f in flags.items()},
        )

    def _ninja(self, toolchain, rules: dict[str, list[str]], sources: list[str], openmp: list[str], nvcc) -> Path:
        """Compiles and links what is out of date; the library."""
        import ninja

        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / Path(self.get_ext_filename("anima_fast._C")).name
        join = subprocess.list2cmdline if MSVC else shlex.join

        def command(arguments: list[str]) -> str:
            # $in and $out are ninja's variables, which it quotes itself; every other dollar is literal.
            text = join([argument.replace("$", "$$") for argument in arguments])
            return text.replace("@in@", "$in").replace("@out@", "$out")

        def run(target: str) -> subprocess.CompletedProcess:
            return subprocess.run(
                [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(folder / "build.ninja"), target],
                env=toolchain.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip

        with open(folder / "build.ninja", "w") as file:
            writer = ninja.Writer(file)
            writer.variable("builddir", str(folder))
            deps_flags, deps = toolchain.depfile
            for isa, rule in rules.items():
                text = f"{command(rule)} $defines {' '.join(deps_flags)}"
                writer.rule(f"compile_{isa}", text, description=f"compile {isa} $in", **deps)
            objects = []
            for source in sources:
                objects.append(str(folder / source.replace("/", "_")) + ".o")
                defines = {"defines": "-DANIMA_CUDA=1"} if nvcc and source.startswith("bindings/") else {}
                writer.build(objects[-1], f"compile_{isa_of(source)}", source, variables=defines)
            cuda_objects = []
            if nvcc:
                deps_flags, deps = nvcc.depfile
                text = f"{command(nvcc.compile('@in@', '@out@', [*nvcc.code, '-Icsrc']))} {' '.join(deps_flags)}"
                writer.rule("compile_cuda", text, description="compile cuda $in", **deps)
                for source in CUDA_SOURCES:
                    cuda_objects.append(str(folder / source.replace("/", "_")) + ".o")
                    writer.build(cuda_objects[-1], "compile_cuda", source)
                writer.build("cuda", "phony", cuda_objects)
            link = toolchain.link(["@in@"], "@out@", [*openmp, *(nvcc.ldflags if nvcc else [])])
            writer.rule("link", command(link), description="link $out")
            writer.build(str(library), "link", [*objects, *cuda_objects])

        done = run(str(library))
        print(done.stdout, end="", file=sys.stderr if done.returncode else sys.stdout)
        if done.returncode and nvcc and (cuda := run("cuda")).returncode:
            raise CudaUnavailable(f"compiling the CUDA sources failed: {first_error(cuda.stdout)}")
        if done.returncode:
            raise Unavailable(f"compiling the C++ sources failed: {first_error(done.stdout)}")
        return library

    def _package_dirs(self) -> list[Path]:
        """Where the package's files go: the build folder, and the source tree of an editable install."""
        places = [Path(self.build_lib) / "anima_fast"]
        return [*places, Path("anima_fast")] if self.inplace else places

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        if self.inplace:
            mapping[str(Path(self.build_lib) / "anima_fast/_build.json")] = "anima_fast/_build.json"
        return mapping

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / "anima_fast/_build.json")]


class Wheel(bdist_wheel):
    """Tags the wheel by what was built, which is known only after the build."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        # A universal2 Python does not make a universal2 extension unless ARCHFLAGS asks for both.
        if not self.root_is_pure and not os.environ.get("ARCHFLAGS"):
            plat = plat.replace("universal2", platform.machine())
        return python, abi, plat


setup(
    # kernels/ stands beside the package in the repository and inside it when installed, editable or not.
    packages=[*find_packages(include=["anima_fast", "anima_fast.*"]), "anima_fast.kernels"],
    package_dir={"anima_fast.kernels": "kernels"},
    ext_modules=[Extension("anima_fast._C", SOURCES, language="c++")],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
