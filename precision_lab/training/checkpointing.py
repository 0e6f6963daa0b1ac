"""Checkpoints through Orbax, and all use of Orbax.

A checkpoint is the train state and a small record (the config, the last metrics, the first bad step if it was noticed),
committed together by one rename: a save that was interrupted is never seen again. The two latest are kept, and the
last whose parameters are finite.
"""

import errno
import gc
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from pydantic import BaseModel

from precision_lab.training.config import RunConfig
from precision_lab.training.state import NEVER, TrainState

_KEPT = 2
_REMOVALS, _BETWEEN_S = 20, 0.05
_NO_ROOM = ("RESOURCE_EXHAUSTED", os.strerror(errno.ENOSPC), "Failed to write")


class Restored(NamedTuple):
    """What was saved: the state, and what the loop knew at that time.

    Attributes:
      state: the train state.
      metrics: the latest value of each metric.
      bad_step: the first step with a non-finite loss as far as the loop had noticed, `NEVER` if it had not. The state
        may know of an earlier one.
    """

    state: TrainState
    metrics: dict[str, float]
    bad_step: int


class Checkpoints:
    """The checkpoints of one run in one folder; use as a context manager. A folder of None saves nothing."""

    def __init__(self, folder: Path | None, config: RunConfig) -> None:
        """Names the folder; entering the context opens it, and creates it if need be."""
        self._folder = None if folder is None else Path(folder).absolute()
        self._config = config.model_dump(mode="json", exclude=_not_semantic(config))
        self._manager: ocp.CheckpointManager | None = None
        self._finite: dict[int, bool] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Checkpoints":
        if self._folder is not None:
            options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, cleanup_tmp_directories=True)
            self._open.enter_context(_QUIET)
            self._manager = self._open.enter_context(ocp.CheckpointManager(self._folder, options=options))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._open.close()
        if kind is not None:
            self._remove_torn()

    def restore(self, shapes: TrainState, step: int | None = None) -> Restored | None:
        """Returns a checkpoint, or None if there is none at all.

        Args:
          shapes: the state as ShapeDtypeStructs, on the devices that their shardings name whatever it was saved on;
            without shardings on the default device.
          step: which one; the latest if None.

        Raises:
          ValueError: the checkpoint was made by a run with another config, or there is none of that step.
        """
        steps = [] if self._manager is None else sorted(self._manager.all_steps())
        if self._manager is None or not steps:
            return None
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"no checkpoint of step {step} in '{self._folder}', only of {steps}.")
        record = self._record(step)
        self._require_same_config(record["config"])
        placed = ocp.args.StandardRestore(_in_place(shapes))
        state = self._manager.restore(step, args=ocp.args.Composite(state=placed))["state"]
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        return Restored(state, metrics, int(record["bad_step"]))

    def save(
        self, step: int, state: TrainState, metrics: Mapping[str, float], bad_step: int = NEVER, *, finite: bool = True
    ) -> None:
        """Saves, and returns when the checkpoint is committed; does nothing if there is one of this step.

        A save that fails leaves the earlier checkpoints as they were, and nothing of its own.

        Raises:
          OSError: ENOSPC, there is no room.
        """
        if self._manager is None or self._folder is None or self._manager.latest_step() == step:
            return
        known = {"metrics": {name: repr(value) for name, value in metrics.items()}, "bad_step": bad_step}
        record = {"config": self._config, "finite": finite, **known}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        full = False
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            self._remove_torn()
            if not any(words in f"{error}" for words in _NO_ROOM):
                raise
            full = True
        if full:
            gc.collect()  # Tasks of Orbax's that failed too complain when they are collected: now, while it is quiet.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        self._finite[step] = finite
        self._drop_old(self._manager)

    def _remove_torn(self) -> None:
        """Removes what a save that failed has left; its threads may go on writing for a moment, so more than once."""
        for _ in range(_REMOVALS):
            torn = [] if self._folder is None else list(self._folder.glob("*.orbax-checkpoint-tmp*"))
            for path in torn:
                shutil.rmtree(path, ignore_errors=True)
            if not torn:
                return
            time.sleep(_BETWEEN_S)

    @property
    def last_finite(self) -> int | None:
        """The step of the latest checkpoint whose parameters are finite; None if there is none."""
        steps = [] if self._manager is None else self._manager.all_steps()
        return max(filter(self._is_finite, steps), default=None)

    def _drop_old(self, manager: ocp.CheckpointManager) -> None:
        """Deletes all but the latest checkpoints and the last finite one."""
        steps = sorted(manager.all_steps())
        for step in sorted({*steps[:-_KEPT]} - {self.last_finite}):
            manager.delete(step)

    def _is_finite(self, step: int) -> bool:
        """Returns whether the parameters saved at a step are finite."""
        if step not in self._finite:
            self._finite[step] = self._record(step).get("finite", True)
        return self._finite[step]

    def _record(self, step: int) -> dict[str, Any]:
        """Returns what is saved beside the state."""
        assert self._manager is not None
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def _require_same_config(self, saved: Mapping[str, Any]) -> None:
        """Raises ValueError if the saved config is not ours."""
        differing = sorted(
            key for key in {**saved, **self._config} if _normal(saved.get(key)) != _normal(self._config.get(key))
        )
        if differing:
            raise ValueError(
                f"the checkpoints in '{self._folder}' belong to a run with another config: "
                f"{', '.join(differing)} differ. Use another folder, or remove it to start afresh."
            )


def read_arrays(folder: Path) -> tuple[Any, Path]:
    """Returns the arrays of a checkpoint, whoever wrote it, as they were saved, and the folder they were found in.

    Args:
      folder: of a run or its checkpoints, of which the latest is taken; of one checkpoint; or of one tree.

    Returns:
      Nested dicts and lists of NumPy arrays. Several trees that were saved together are under their names.

    Raises:
      ValueError: there is no Orbax checkpoint of trees, or one that cannot be read.
    """
    trees = _trees_in(folder)
    if not trees:
        raise ValueError(f"'{folder}' holds no Orbax checkpoint of a tree: no _METADATA in it, or in its latest step.")
    found = {}
    with _QUIET, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for path in trees:
            try:
                shapes = checkpointer.metadata(path).item_metadata.tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
                found[path.name] = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            except Exception as error:  # Of many kinds, for files that are torn or of an unknown layout.
                message = " ".join(f"{error}".split())[:200]
                raise ValueError(f"'{path}' cannot be read: {type(error).__name__}: {message}") from error
    return (next(iter(found.values())), trees[0]) if len(found) == 1 else (found, trees[0].parent)


def _trees_in(folder: Path) -> list[Path]:
    """Returns the folders of the trees that were saved together last."""
    folder = Path(folder).absolute()
    if (folder / "_METADATA").is_file():
        return [folder]
    steps = sorted((path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()), key=_number)
    if steps:
        return _trees_in(steps[-1])
    trees = sorted(path.parent for path in folder.glob("*/_METADATA"))
    return trees or (_trees_in(folder / "checkpoints") if (folder / "checkpoints").is_dir() else [])


def _number(path: Path) -> int:
    return int(path.name)


def _not_semantic(config: BaseModel) -> dict[str, Any]:
    """Returns, nested as in `config`, the fields that do not tell runs apart.

    These are the ones marked `{"semantic": False}`, which may differ from call to call, and the ones marked
    `{"legacy": value}` that have this value, which checkpoints from before there was such a field do not name.
    """
    found: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value, marks = getattr(config, name), field.json_schema_extra
        marks = marks if isinstance(marks, dict) else {}
        if not marks.get("semantic", True) or ("legacy" in marks and _is(value, marks["legacy"])):
            found[name] = True
        elif inner := _not_semantic_within(value):
            found[name] = inner
    return found


def _not_semantic_within(value: Any) -> dict[Any, Any]:
    """Returns those of the configs within a value: itself, or by place in a tuple or mapping."""
    if isinstance(value, BaseModel):
        return _not_semantic(value)
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    return {place: inner for place, part in parts if (inner := _not_semantic_within(part))}


def _is(value: Any, legacy: Any) -> bool:
    """Returns whether the value of a field is the one that it is marked with, as JSON."""
    plain = value.model_dump(mode="json", exclude=_not_semantic(value)) if isinstance(value, BaseModel) else value
    return _normal(plain) == _normal(legacy)


def _normal(value: Any) -> Any:
    """Returns a JSON value with tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list | tuple) else value


def _in_place(shapes: TrainState) -> TrainState:
    """Returns `shapes`, those without a place on the default device."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one), shapes)


class _Quiet:
    """Keeps Orbax's messages, which come from several threads, out of the output; its errors are raised anyway.

    Runs in several threads may be in this context at once: the first to come in silences the loggers, and the last
    to leave gives them back their levels.
    """

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]
        self._levels: list[int] = []
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._levels = [logger.level for logger in self._loggers]
                self._set([logging.CRITICAL] * len(self._loggers))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(self._levels)

    def _set(self, levels: Sequence[int]) -> None:
        for logger, level in zip(self._loggers, levels, strict=True):
            logger.setLevel(level)


_QUIET = _Quiet("absl", "asyncio")
