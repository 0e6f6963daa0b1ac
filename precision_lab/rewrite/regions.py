"""Regions of code that policies leave alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import jax

from precision_lab.rewrite.sites import FULL_PRECISION

Function = TypeVar("Function", bound=Callable[..., Any])


@contextlib.contextmanager
def _region() -> Iterator[None]:
    with jax.named_scope(FULL_PRECISION):
        yield


@overload
def full_precision(fn: Function, /) -> Function: ...
@overload
def full_precision() -> contextlib.AbstractContextManager[None]: ...
def full_precision(fn: Any = None, /) -> Any:
    """Marks code whose operations no policy touches: a decorator, or a context manager when called without a function.

        with pl.full_precision():
            angles = positions[:, None] @ frequencies[None]

    What runs inside, called functions included, keeps the types that its author gave it; `sites` lists its products
    as "full_precision region". Without a policy it changes nothing.

    Args:
      fn: function to mark; without it, a context manager is returned.
    """
    if fn is None:
        return _region()
    return _region()(fn)  # a context manager made by contextlib is a decorator too, entered anew at each call
