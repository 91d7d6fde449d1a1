"""Runs the kernels of csrc/cuda on the CPU: builds them with g++ against simt.h and calls them with torch tensors.

    library = simt.build()                      every csrc/cuda/*.cu, for sm_80 and later; arch=75 for Turing's paths
    library.run(ssd_chunk_scan, x, dt, ...)     the backend function of anima_fast/ops/cuda, with CPU tensors

`run` puts the library in the place of the extension, so that the Python side is what a user runs. Every tensor among
the arguments, and every one the function allocates, is a buffer to the kernels and nothing else is: an access elsewhere
fails with the kernel, the thread, the buffer and the line. Only parameters in WRITTEN may be written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import anima_fast.ops.cuda as ops_cuda
import anima_fast.ops.extension as ops_extension

_EXTENSION, _STREAM = ops_extension.extension, ops_cuda.stream  # what `run` replaces

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "simt"
COMPILER = shutil.which("g++")

# Parameters of the backend functions that are outputs. What a function allocates is writable too.
WRITTEN = {"y", "final_state", "varlen_states", "state", "out", "o", "final_states", "conv_state"}

COMMON = [
    "-std=c++17",
    "-g",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-U_FORTIFY_SOURCE",
    f"-I{ROOT / 'csrc'}",
    f"-I{HERE}",
]
# Every access of a kernel calls into simt.cpp. Without -fno-gnu-unique, static __shared__ arrays of templates would be
# shared between the libraries of one process.
INSTRUMENTED = [
    "-O1", "-fno-gnu-unique", "-Wno-unknown-pragmas",
    "-fsanitize=thread,bounds,alignment,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow",
]  # fmt: skip


def available() -> str | None:
    """Why this machine cannot run the harness, or None."""
    if not sys.platform.startswith("linux"):
        return "the SIMT harness needs Linux"
    return None if COMPILER else "the SIMT harness needs g++"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr[-8000:]}")


@functools.cache
def build(sources: tuple[Path, ...] = (), arch: int = 80) -> Library:
    """A library of these .cu files (all of csrc/cuda) and the machine; compiled once for each content."""
    bridge = [] if sources else [HERE / "entry_points.cpp"]
    sources = sources or tuple(sorted((ROOT / "csrc/cuda").glob("*.cu")))
    headers = [HERE / "simt.h", *sorted((ROOT / "csrc/common").glob("*.h")), *sorted((ROOT / "csrc/cuda").glob("*.*h"))]
    shared = hashlib.sha256(b"".join(h.read_bytes() for h in headers))
    shared.update(f"{arch} {COMMON} {INSTRUMENTED} {COMPILER}".encode())

    def compile_one(source: Path) -> Path:
        digest = shared.copy()
        digest.update(source.read_bytes())
        target = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            flags = INSTRUMENTED if source.suffix == ".cu" else ["-O2"]
            partial = target.with_suffix(f".{os.getpid()}.tmp")
            command = [COMPILER, *COMMON, *flags, f"-DSIMT_ARCH={arch}0", "-x", "c++", "-c", source, "-o", partial]
            _run(list(map(str, command)))
            partial.rename(target)
        return target

    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [HERE / "simt.cpp", *bridge, *sources]))
    name = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = CACHE / f"{name}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        _run([str(COMPILER), "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-ldl", "-o", str(partial)])
        partial.rename(library)
    return Library(library)


def span(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element; strides may be 0."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class Library:
    """One build, loaded. `call` is for plain entry points, `run` for the backend functions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.simt_error.restype = ctypes.c_char_p
        self.c.simt_launched.restype = ctypes.c_char_p

    @contextlib.contextmanager
    def buffers(self, tensors: dict[str, tuple[torch.Tensor, bool]]):
        """These tensors, name: (tensor, writable), are the global memory of the launches inside."""
        self.c.simt_reset()
        # An address in two buffers, of a state that is updated in place, counts as of the first.
        for name, (tensor, writable) in sorted(tensors.items(), key=lambda item: not item[1][1]):
            self._register(name, tensor, writable)
        try:
            yield
            self.check()
        finally:
            self.c.simt_reset()

    def _register(self, name: str, tensor: torch.Tensor, writable: bool) -> None:
        self.c.simt_register(
            name.encode(), ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(span(tensor)), int(writable)
        )

    def check(self, returned: bytes | None = None) -> None:
        """Raises RuntimeError with the error of the launches so far, if there is one."""
        error = returned or self.c.simt_error()
        if error:
            raise RuntimeError(error.decode())

    def call(self, function: str, *arguments: torch.Tensor | int | float, written: tuple[int, ...] = ()) -> None:
        """Calls `extern "C" const char* function(...)`: tensors as pointers, numbers as int or float.

        `written` names the positions of the tensors that may be written.
        """
        entry = getattr(self.c, function)
        entry.restype = ctypes.c_char_p
        tensors = {f"{i}": (a, i in written) for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
        with self.buffers(tensors):
            self.check(entry(*(_plain(a) for a in arguments)))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a backend function of anima_fast/ops/cuda with CPU tensors, this library in the extension's place."""
        named = inspect.signature(function).bind(*args, **kwargs).arguments
        known = {name: (t, name in WRITTEN) for name, t in named.items() if isinstance(t, torch.Tensor)}
        with contextlib.ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith("anima_fast.ops."):
                    if getattr(module, "extension", None) is _EXTENSION:
                        stack.enter_context(mock.patch.object(module, "extension", lambda: self))
                    if getattr(module, "stream", None) is _STREAM:
                        stack.enter_context(
                            mock.patch.object(module, "stream", lambda device: contextlib.nullcontext(0))
                        )
            stack.enter_context(self.buffers(known))
            stack.enter_context(_Allocations(self, [t for t, _ in known.values()]))
            return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name not in _structs():
            raise AttributeError(name)
        return functools.partial(Call, self, name)

    def launched(self) -> set[str]:
        """The kernels that were launched so far, as the launches spell them."""
        return set(self.c.simt_launched().decode().splitlines())


class _Allocations(TorchDispatchMode):
    """Makes every tensor that torch allocates inside a writable buffer; uninitialised memory is poisoned."""

    def __init__(self, library: Library, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.library = library
        self.storages = {t.untyped_storage().data_ptr() for t in known}
        self.kept: list[torch.Tensor] = []  # an address that torch gives out twice would be two buffers

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(t, torch.Tensor) or t.untyped_storage().data_ptr() in self.storages or not t.numel():
                continue
            if "empty" in str(function):
                ctypes.memset(t.data_ptr(), 0xFF, span(t))
            self.library._register(f"allocated by {function}", t, True)
            self.storages.add(t.untyped_storage().data_ptr())
            self.kept.append(t)
        return result


class _Tensor(ctypes.Structure):
    """anima::Tensor of csrc/common/tensor.h"""

    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64 * 4))


_FIELD_TYPES = {
    "Tensor": _Tensor, "const int32_t*": ctypes.c_void_p, "int64_t": ctypes.c_int64, "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}  # fmt: skip


@functools.cache
def _structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of csrc/common/scans.h."""
    text = re.sub(r"//.*", "", (ROOT / "csrc/common/scans.h").read_text())
    structs: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind = next(kind for kind in _FIELD_TYPES if declaration.startswith(f"{kind} "))
            names = declaration.removeprefix(kind).split(",")
            fields += [(field.strip(), _FIELD_TYPES[kind]) for field in names]
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


class Call:
    """What a class of bindings/scans.cpp is to the Python side, over the library's entry points."""

    def __init__(self, library: Library, name: str, /, **values: Any) -> None:
        self._library = library
        self._op = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        struct = _structs()[name]
        size = getattr(library.c, f"simt_sizeof_{name}")
        size.restype = ctypes.c_size_t
        assert size() == ctypes.sizeof(struct), f"{name} is not what csrc/common/scans.h says"
        fields = dict(struct._fields_)
        assert set(values) == set(fields), f"{name}: {set(values) ^ set(fields)} given or missing"
        for field, value in values.items():
            if fields[field] is _Tensor:
                address, dtype, strides = value or (0, 0, ())
                values[field] = _Tensor(address, dtype, (ctypes.c_int64 * 4)(*strides))
            elif fields[field] is ctypes.c_void_p:  # int32 pointers
                values[field] = value[0] if isinstance(value, tuple) else value
        self._struct = struct(**values)

    def cuda_workspace(self) -> int:
        return self._workspace(self._op)

    def cuda_step_workspace(self) -> int:
        return self._workspace("gated_delta_step")

    def cuda(self, workspace: int, stream: int) -> None:
        self._run(self._op, workspace)

    def cuda_step(self, workspace: int, stream: int) -> None:
        self._run("gated_delta_step", workspace)

    def _workspace(self, op: str) -> int:
        function = getattr(self._library.c, f"simt_{op}_workspace")
        function.restype = ctypes.c_int64
        return int(function(ctypes.byref(self._struct)))

    def _run(self, op: str, workspace: int) -> None:
        function = getattr(self._library.c, f"simt_{op}")
        function.restype = ctypes.c_char_p
        self._library.check(function(ctypes.byref(self._struct), ctypes.c_void_p(workspace)))


def _plain(argument: torch.Tensor | int | float) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)
