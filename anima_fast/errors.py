"""How errors speak: the argument, what came, what is allowed."""

from __future__ import annotations

__all__ = ["NoBackendError", "invalid", "wrong_type"]


class NoBackendError(RuntimeError):
    """No backend of an op can serve a call; the message lists each backend with its reason."""


def invalid(argument: str, got: object, allowed: str) -> ValueError:
    """A `ValueError` that names the argument, what was given and what is allowed."""
    return ValueError(f"{argument}: got {got}; allowed: {allowed}")


def wrong_type(argument: str, got: object, allowed: str) -> TypeError:
    """A `TypeError` that names the argument, the type that was given and what is allowed."""
    return TypeError(f"{argument}: got {type(got).__name__}; allowed: {allowed}")
