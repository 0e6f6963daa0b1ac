"""Checkpoints through Orbax, and all use of Orbax.

A checkpoint is the train state and a small record (the config, the last metrics, the first bad step if it was noticed),
committed together by one rename: a save that was interrupted is never seen again. The two latest are kept.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from pydantic import BaseModel

from precision_lab.training.config import RunConfig
from precision_lab.training.state import NEVER, TrainState

_KEPT = 2


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
        self._open = ExitStack()

    def __enter__(self) -> "Checkpoints":
        if self._folder is not None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=_KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
            self._open.enter_context(_quiet())
            self._manager = self._open.enter_context(ocp.CheckpointManager(self._folder, options=options))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def restore(self, shapes: TrainState) -> Restored | None:
        """Returns the latest checkpoint, or None if there is none.

        Args:
          shapes: the state as ShapeDtypeStructs.

        Raises:
          ValueError: the checkpoint was made by a run with another config.
        """
        step = None if self._manager is None else self._manager.latest_step()
        if self._manager is None or step is None:
            return None
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        self._require_same_config(record["config"])
        placed = ocp.args.StandardRestore(_on_one_device(shapes))
        state = self._manager.restore(step, args=ocp.args.Composite(state=placed))["state"]
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        return Restored(state, metrics, int(record["bad_step"]))

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float], bad_step: int = NEVER) -> None:
        """Saves, and returns when the checkpoint is committed; does nothing if there is one of this step."""
        if self._manager is None or self._manager.latest_step() == step:
            return
        known = {"metrics": {name: repr(value) for name, value in metrics.items()}, "bad_step": bad_step}
        record = {"config": self._config, **known}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=args, force=True)

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


def _not_semantic(config: BaseModel) -> dict[str, Any]:
    """Returns, nested as in `config`, the fields marked `{"semantic": False}`: they may differ from call to call."""
    found: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value, marks = getattr(config, name), field.json_schema_extra
        if isinstance(marks, dict) and not marks.get("semantic", True):
            found[name] = True
        elif isinstance(value, BaseModel) and (inner := _not_semantic(value)):
            found[name] = inner
    return found


def _normal(value: Any) -> Any:
    """Returns a JSON value with tuples as lists."""
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list | tuple) else value


def _on_one_device(shapes: TrainState) -> TrainState:
    """Returns `shapes` placed on the default device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's routine messages, which go to absl's logger from several threads, out of the run's output."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
