"""Runs in lockstep: each in a thread with a loop of its own, their steps taken at once by one vmapped executable.

A run in a lane is the run that it is alone: it evaluates, saves, stops and resumes by itself, at steps of its own. Only
its step waits for those of the other lanes. The states stay stacked on the device from step to step; one is taken out
of the stack when its run looks at it. A lane whose run has ended goes on with its last batch, unseen, until all have.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.training.state import TrainState

_lane: ContextVar[tuple[Lockstep, int] | None] = ContextVar("lane", default=None)


def in_lane(program: Any, structure: Any) -> Any:
    """Returns the `Program` of a structure, whose step is that of all lanes where the caller runs in one."""
    found = _lane.get()
    if found is None:
        return program
    lockstep, lane = found
    return program._replace(step=functools.partial(lockstep.step, lane, structure, program.step))


class Lockstep:
    """So many lanes, whose runs have equal structure."""

    def __init__(self, lanes: int) -> None:
        """Makes the lanes; each has to be entered, or left, by `lane` once, or the others wait for it."""
        self._condition = threading.Condition()
        self._running = set(range(lanes))
        self._calls: dict[int, tuple[Any, Any, Any]] = {}  # of each lane: state, batch, numbers of its latest call
        self._arrived: set[int] = set()
        self._places: dict[int, int] = {}  # of each lane in the stack
        self._stack: Any = None
        self._numbers: Any = None
        self._structure: Any = None
        self._step: Any = None
        self._measured: _Measured | None = None
        self._error: BaseException | None = None

    @contextmanager
    def lane(self, number: int) -> Iterator[None]:
        """Makes the steps of runs in this thread those of a lane; when it is left, the others no longer wait for it."""
        token = _lane.set((self, number))
        try:
            yield
        finally:
            _lane.reset(token)
            with self._condition:
                self._running.discard(number)
                self._condition.notify_all()

    def step(
        self, lane: int, structure: Any, step: Callable[..., Any], state: Any, batch: Any, numbers: Any
    ) -> tuple[Any, Any]:
        """Returns what `step(state, batch, numbers)` does, once all lanes that still run have called this.

        Steps of one structure do the same, whether or not they are one object.

        Raises:
          ValueError: its structure is not that of the other lanes.
          Exception: what the step of all lanes raised, in each of them.
        """
        with self._condition:
            if self._step is None:
                self._structure, self._step = structure, step
            if structure != self._structure:
                self._error = self._error or ValueError(
                    "runs that share no program cannot take their steps at once; make them in turn."
                )
            self._calls[lane] = state, batch, numbers
            self._arrived.add(lane)
            measured = self._measured
            self._condition.notify_all()
            while self._measured is measured and self._error is None:
                if self._arrived >= self._running:
                    self._advance()
                else:
                    self._condition.wait()
            if self._error is not None:
                raise self._error
            assert self._measured is not None
            place = self._places[lane]
            return LaneState(self._stack, place), _OfLane(self._measured, place)

    def _advance(self) -> None:
        """Takes a step of all lanes."""
        try:
            if self._stack is None:
                self._gather()
            batches = [self._calls[lane][1] for lane in self._places]
            batch = jax.tree.map(lambda *parts: np.stack(parts), *batches)
            self._stack, metrics = _vmapped(self._step)(self._stack, batch, self._numbers)
            self._measured = _Measured(metrics)
        except BaseException as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                lanes = len(self._places)
                error = MemoryError(f"{lanes} runs at once do not fit: make fewer at once, --jobs N. {error}")
            self._error = error
        self._arrived.clear()
        self._condition.notify_all()

    def _gather(self) -> None:
        """Makes the stack of the states before the first step; a lane that has been left by then has no place in it."""
        self._places = {lane: place for place, lane in enumerate(sorted(self._calls))}
        states, _, numbers = zip(*(self._calls[lane] for lane in self._places), strict=True)
        self._stack, self._numbers = _stacked(states), _stacked(numbers)


class LaneState:
    """Where the train state of one lane is in the stack; valid until the next step."""

    def __init__(self, stack: TrainState, place: int) -> None:
        """Names a place in a stack."""
        self._stack, self._place = stack, place

    @functools.cached_property
    def taken(self) -> TrainState:
        """The state, as arrays of its own."""
        return _take(self._stack, self._place)


def alone(state: Any) -> TrainState:
    """Returns a train state, taken out of the stack if it is in one."""
    return state.taken if isinstance(state, LaneState) else state


class _Measured:
    """Metrics of all lanes after one step, fetched from the device when the first lane asks."""

    def __init__(self, metrics: Mapping[str, jax.Array]) -> None:
        """Keeps what is still on the device."""
        self.names = tuple(metrics)
        self._metrics = metrics

    @functools.cached_property
    def fetched(self) -> Mapping[str, np.ndarray]:
        """Arrays (lanes,) by name."""
        return jax.device_get(dict(self._metrics))


class _OfLane(Mapping[str, Any]):
    """Metrics of one lane."""

    def __init__(self, measured: _Measured, place: int) -> None:
        self._measured, self._place = measured, place

    def __getitem__(self, name: str) -> Any:
        return self._measured.fetched[name][self._place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured.names)

    def __len__(self) -> int:
        return len(self._measured.names)


def _stacked(trees: Any) -> Any:
    """Returns trees of arrays as one, with a new first axis."""
    return jax.jit(lambda *each: jax.tree.map(lambda *x: jnp.stack(x), *each))(*trees)


@jax.jit
def _take(stack: Any, place: int) -> Any:
    """Returns one of the trees in a stack."""
    return jax.tree.map(lambda x: x[place], stack)


@functools.lru_cache(maxsize=16)
def _vmapped(step: Any) -> Any:
    """Returns the step of a stack."""
    return jax.jit(jax.vmap(step), donate_argnums=0)
