"""Which backend serves a call: declared, not tried.

An op has backends in order of preference. Each states its constraints; the first whose constraints all hold
for a call runs. `use_backend(name)` or the environment variable ANIMA_FAST_BACKEND force one, and a forced
backend that cannot serve is an error with its reason. There is no fallback after a failure.

A call is described by its *facts*: a mapping such as {"device": "cpu", "dtype": torch.float32, "head_dim": 128,
"mask": False}. A constraint is a sentence and a check of those facts.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch

from .errors import NoBackendError, invalid

__all__ = ["Backend", "Constraint", "Op", "backends", "explain", "use_backend"]

Facts = Mapping[str, Any]

ENVIRONMENT = "ANIMA_FAST_BACKEND"

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("anima_fast_backend", default=None)


@dataclasses.dataclass(frozen=True)
class Constraint:
    """One thing a backend needs: `needs` in words, `why_not(facts)` the reason it is not met, or None."""

    needs: str
    why_not: Callable[[Facts], str | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of an op. `function` is "module:name", imported at the first call;
    `unavailable()` says why this machine cannot run it at all, or None."""

    name: str
    function: str
    constraints: tuple[Constraint, ...] = ()
    unavailable: Callable[[], str | None] = lambda: None

    def why_not(self, facts: Facts) -> str | None:
        """The first reason this backend cannot serve a call with these facts, or None."""
        reason = self.unavailable()
        if reason:
            return reason
        for constraint in self.constraints:
            reason = constraint.why_not(facts)
            if reason:
                return reason
        return None

    @functools.cached_property
    def implementation(self) -> Callable[..., Any]:
        """The function itself."""
        return self.attribute(self.function.partition(":")[2])

    def attribute(self, name: str) -> Callable[..., Any]:
        """Something else of the function's module, such as its `workspace_bytes`."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.function.partition(":")[0]), name)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """A public op: its backends in order of preference, and `facts(*args, **kwargs)` of a call."""

    name: str
    backends: tuple[Backend, ...]
    facts: Callable[..., Facts]
    _selected: dict[tuple[Any, ...], Backend] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def select(self, facts: Facts, backend: str | None = None) -> Backend:
        """The backend that serves such a call: the named or forced one, or else the first that can. It is found
        once for all calls with the same facts: in a small model, asking each time costs more than attention.

        Raises ValueError for an unknown name, NoBackendError with every backend's reason if none can.
        """
        name = backend or forced_backend()
        kind = (name, *facts.values())
        if kind not in self._selected:
            self._selected[kind] = self._find(facts, name)
        return self._selected[kind]

    def _find(self, facts: Facts, name: str | None) -> Backend:
        if name is None:
            for candidate in self.backends:
                if candidate.why_not(facts) is None:
                    return candidate
            reasons = "\n".join(f"  {b.name}: {b.why_not(facts)}" for b in self.backends)
            raise NoBackendError(f"{self.name}: no backend can serve this call\n{reasons}")
        by_name = {b.name: b for b in self.backends}
        if name not in by_name:
            raise invalid("backend", repr(name), " | ".join(by_name))
        reason = by_name[name].why_not(facts)
        if reason:
            raise NoBackendError(f"{self.name}: backend {name!r} was forced but cannot serve this call: {reason}")
        return by_name[name]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def torch_op(name: str) -> Callable[[_Function], _Function]:
    """Makes a function the implementation of the torch op `anima_fast::name`, whose schema is defined, and returns what
    is to be called: at once the function itself where nobody compiles, traces or transforms, else the op. The way
    through torch's dispatcher into Python costs more than attention does in a small model.

    Example:
        >>> @torch_op("causal_conv1d")
        ... def _causal_conv1d(x, weight, ...): ...
    """

    def register(function: _Function) -> _Function:
        torch.library.impl(f"anima_fast::{name}", "default", function)
        op = getattr(torch.ops.anima_fast, name)

        @functools.wraps(function)
        def call(x: torch.Tensor, *rest: Any) -> Any:
            return op(x, *rest) if _observed(x) else function(x, *rest)

        return cast(_Function, call)

    return register


def _observed(x: torch.Tensor) -> bool:
    return (
        type(x) is not torch.Tensor
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0  # FakeTensorMode, make_fx, FLOP counters
        or torch._C._functorch.maybe_current_level() is not None  # vmap
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
    )


_ops: dict[str, Op] = {}


def register(op: Op) -> Op:
    _ops[op.name] = op
    return op


def backends() -> dict[str, dict[str, str | None]]:
    """For each op, each backend in order of preference: None if this machine can run it, or the reason not.

    Example:
        >>> backends()["regional_attention"]["reference"] is None
        True
    """
    return {op.name: {b.name: b.unavailable() for b in op.backends} for op in _ops.values()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside the context (this thread, this async task).

    Raises ValueError for a name that no op knows.

    Example:
        >>> with use_backend("reference"):
        ...     out = regional_attention(q, k, v, plan)
    """
    known = sorted({b.name for op in _ops.values() for b in op.backends})
    if name not in known:
        raise invalid("name", repr(name), " | ".join(known))
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that `use_backend` or ANIMA_FAST_BACKEND asks for, if any."""
    return _forced.get() or os.environ.get(ENVIRONMENT) or None


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which backend `op(*args, **kwargs)` would run, and every other backend's reason, as text.

    Example:
        >>> print(explain("regional_attention", q, k, v, plan))
        regional_attention: cpu
          cpu        would run
          triton     needs a CUDA device ...
    """
    if op not in _ops:
        raise invalid("op", repr(op), " | ".join(_ops))
    entry = _ops[op]
    backend = kwargs.pop("backend", None)
    facts = entry.facts(*args, **kwargs)
    try:
        chosen = entry.select(facts, backend).name
        head = f"{op}: {chosen}"
    except NoBackendError as error:
        chosen, head = None, str(error).splitlines()[0]
    lines = [head]
    for b in entry.backends:
        reason = b.why_not(facts)
        state = "would run" if b.name == chosen else "could run" if reason is None else reason
        lines.append(f"  {b.name:<10} {state}")
    return "\n".join(lines)


def one_of(fact: str, *allowed: Any) -> Constraint:
    """`facts[fact]` is one of `allowed`."""
    names = ", ".join(str(a).removeprefix("torch.") for a in allowed)

    def why_not(facts: Facts) -> str | None:
        if facts[fact] in allowed:
            return None
        return f"needs {fact.replace('_', ' ')} {names}; got {str(facts[fact]).removeprefix('torch.')}"

    return Constraint(f"{fact.replace('_', ' ')}: {names}", why_not)


def within(fact: str, low: int, high: int) -> Constraint:
    """low <= facts[fact] <= high."""

    def why_not(facts: Facts) -> str | None:
        if low <= facts[fact] <= high:
            return None
        return f"needs {fact.replace('_', ' ')} from {low} to {high}; got {facts[fact]}"

    return Constraint(f"{fact.replace('_', ' ')}: {low} to {high}", why_not)


def without(fact: str, what: str) -> Constraint:
    """`facts[fact]` is false: the backend does not take `what`."""
    return Constraint(f"no {what}", lambda facts: f"does not take {what}" if facts[fact] else None)
