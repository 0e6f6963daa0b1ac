"""The training loop: steps, evaluations, rows of metrics, checkpoints, in a fixed order.

After each step: its row of metrics, the evaluation, the checkpoint, each if it is due. Rows are written before the
checkpoint that covers them, so a run that was killed loses rows only past its last checkpoint, and makes them
again. Nothing random is carried along: batches are functions of (seed, step), and the rest is in the state.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax

from precision_lab import data
from precision_lab.data import DataConfig, Dataset
from precision_lab.training.beginning import beginning, check_beginning
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.config import RunConfig
from precision_lab.training.evaluation import check_evaluations, evaluate, under_other_policies, weight_errors
from precision_lab.training.lockstep import alone, in_lane
from precision_lab.training.numbers import hyper, static_part
from precision_lab.training.once import once
from precision_lab.training.placement import Placement, check_placement
from precision_lab.training.program import Program, check_program, program_for
from precision_lab.training.rows import evaluates_at, is_due, logs_at
from precision_lab.training.state import NEVER, TrainState, all_finite

_EVAL_BATCH = 512


class MetricSink(Protocol):
    """Where rows of metrics go."""

    def restart(self, step: int) -> None:
        """Drops rows past `step`; called once, before the first row. -1 drops them all."""

    def write(self, row: Mapping[str, object]) -> None:
        """Keeps a row: "step", "split" ("train", "eval" or "eval_train"), and metrics by name."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      status: "diverged" if an applied step or an evaluation had a non-finite loss and the config says to stop there;
        "stopped" if it was asked to stop, and has saved.
      step: the last step, or the one that diverged.
      metrics: latest value of each metric by "split/name".
      first_nonfinite: the first applied step whose loss was not finite, between rows too; None if there was none, or
        none that a row has told of yet in a run that was stopped.
      last_finite: step of the latest checkpoint with finite parameters, None if there is none; no part of the result.
    """

    status: Literal["done", "diverged", "stopped"]
    step: int
    metrics: dict[str, float]
    first_nonfinite: int | None = None
    last_finite: int | None = dataclasses.field(default=None, compare=False, repr=False)


def check(config: RunConfig) -> None:
    """Makes sure that a run can start: traces its step, without compiling, running or writing anything.

    Raises:
      ValueError: the model cannot learn the data, a rule of a policy matches no site, a transform does not fit, or a
        batch is larger than the training split.
      DataError: the data cannot be loaded.
    """
    dataset = _dataset(config.data)  # pyright: ignore[reportArgumentType] (frozen: hashable)
    data.batches(dataset, config.data, config.seed)
    check_placement(config)
    program = program_for(config, dataset.spec)
    check_program(program, config)
    check_beginning(program, config)
    check_evaluations(program, config, dataset.spec)


def train(
    config: RunConfig,
    *,
    checkpoint_dir: Path | None,
    sink: MetricSink,
    on_step: Callable[[int, float], None] | None = None,
    start_from: Path | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> RunResult:
    """Trains what `config` describes, from the latest checkpoint if there is one, and returns how it ended.

    A run that is killed at any moment and called again gives bitwise the metrics of one that was not (on the same
    machine, with the same libraries, and in lockstep with as many others as before, if with any). A finished run
    returns its result again and trains nothing. A run of no steps saves nothing.

    Args:
      config: the run.
      checkpoint_dir: folder for checkpoints of this run alone, or None to save nothing.
      sink: receives rows of metrics. Training metrics are those of the step's own batch; evaluation uses the
        parameters as stored, not the masters, under the policy.
      on_step: called after every step with its number and the latest known training loss, which is fetched from the
        device only when a row is due (NaN before that).
      start_from: folder of the checkpoints of `config.start.run`, for a run that begins from its final parameters.
      should_stop: asked after every step but the last; once it says so the run saves and returns "stopped", and
        goes on from there when called again.

    Raises:
      ValueError: the model cannot learn the data, a rule of the policy matches no site, or the checkpoints belong to
        another config.
      DataError: a data file is missing or wrong.
    """
    dataset = _dataset(config.data)  # pyright: ignore[reportArgumentType] (frozen: hashable)
    placement = Placement(config)
    whole = program_for(config, dataset.spec)
    program = in_lane(placement.program(whole), static_part(config))
    batches = data.batches(dataset, config.data, config.seed)
    with Checkpoints(checkpoint_dir, config) as checkpoints:
        restored = checkpoints.restore(program.state_shapes)
        begun = beginning(config, whole, dataset.spec, start_from, batches) if restored is None else None
        state, metrics, bad_step = restored or (placement.place(begun.state), {}, NEVER)  # pyright: ignore
        run = _Run(config, program, placement, dataset, sink, checkpoints, metrics, bad_step)
        result = run.go(
            state,
            batches,
            on_step or (lambda step, loss: None),
            should_stop or (lambda: False),
            audit=begun and begun.audit,
        )
        return dataclasses.replace(result, last_finite=checkpoints.last_finite)


class _Run:
    """One call of `train`: what stays the same from step to step, and the latest metrics."""

    def __init__(
        self,
        config: RunConfig,
        program: Program,
        placement: Placement,
        dataset: Dataset,
        sink: MetricSink,
        checkpoints: Checkpoints,
        metrics: dict[str, float],
        bad_step: int,
    ) -> None:
        self._config = config
        self._program = program
        self._placement = placement
        others = under_other_policies(program, config, dataset.spec)
        self._others = {
            name: one._replace(evaluate=placement.evaluator(one.evaluate, one.state_shapes))
            for name, one in others.items()
        }
        self._weights = weight_errors(config, dataset.spec)
        self._dataset = dataset
        self._sink = sink
        self._checkpoints = checkpoints
        self._metrics = dict(metrics)
        # As the last row of training metrics said, not as the state knows: whether to stop is asked of this one, so
        # a run that goes on from a checkpoint must not know of a bad step any earlier than one that never stopped.
        self._bad_step = bad_step

    def go(
        self,
        state: TrainState,
        batches: Any,
        on_step: Callable[[int, float], None],
        should_stop: Callable[[], bool],
        *,
        audit: Mapping[str, float] | None,
    ) -> RunResult:
        """Returns the result after training `state` to the end; a run from its beginning has an audit, empty or not."""
        start, train, steps = int(state.step), self._config.train, self._config.train.steps
        self._sink.restart(start if audit is None else -1)
        if audit:
            self._write(0, "start", audit)
        if audit is not None:
            self._evaluate(0, state)
        numbers = hyper(self._config)
        done = start
        while done < steps and not self._stops():
            state, measured = self._program.step(state, batches[done], numbers)
            done += 1
            if logs_at(train, done):
                self._log(done, measured)
            last = done == steps or self._stops()
            if last or evaluates_at(train, done):
                self._evaluate(done, alone(state))
                last = last or self._stops()
            if last or is_due(train, done, train.checkpoint_every):
                self._save(done, alone(state))
            on_step(done, self._metrics.get("train/loss", math.nan))
            if not last and should_stop():
                self._save(done, alone(state))
                return self._ended("stopped", done)
        return self._result(done)

    def _save(self, done: int, state: TrainState) -> None:
        """Saves the state, and whether a person could start from it again."""
        finite = not self._stops() and all_finite((state.params, state.model_state)).item()
        self._checkpoints.save(done, state, self._metrics, self._bad_step, finite=finite)

    def _stops(self) -> bool:
        """Returns whether the run has diverged and is to stop for it."""
        if self._config.train.on_nonfinite != "stop":
            return False
        evaluated = (self._metrics.get(f"{split}/loss", 0.0) for split in ("eval", "eval_train"))
        return self._bad_step != NEVER or not all(map(math.isfinite, evaluated))

    def _result(self, done: int) -> RunResult:
        """Returns how the run ended after `done` steps."""
        if self._stops():
            return self._ended("diverged", done if self._bad_step == NEVER else self._bad_step)
        return self._ended("done", done)

    def _ended(self, status: Literal["done", "diverged", "stopped"], step: int) -> RunResult:
        """Returns a result with what is known by now."""
        return RunResult(status, step, dict(self._metrics), None if self._bad_step == NEVER else self._bad_step)

    def _log(self, done: int, measured: Mapping[str, jax.Array]) -> None:
        """Writes a row of training metrics, and notices the first bad step so far."""
        values = {name: value.item() for name, value in jax.device_get(dict(measured)).items()}
        self._bad_step = values.pop("first_nonfinite")
        self._write(done, "train", values)

    def _evaluate(self, done: int, state: TrainState) -> None:
        """Writes a row for the held-out split, one for the training split, and one for each further policy."""
        limit = self._config.train.eval_examples
        programs = {name: (name, self._program) for name in ("eval", "eval_train")}
        programs |= {f"eval_{name}": ("eval", one) for name, one in self._others.items()}
        for name, (split, program) in programs.items():
            values = evaluate(program, state, getattr(self._dataset, split), self._eval_batch(), limit)
            if program is not self._program:
                values["excess"] = values["loss"] - self._metrics["eval/loss"]
            self._write(done, name, values)
        for name, measure in self._weights.items():
            self._write(done, name, measure(state))

    def _eval_batch(self) -> int:
        """Returns how many examples to evaluate at once: of text no more than training does, its logits are large."""
        batch = self._config.data.batch
        most = batch if self._dataset.spec.task == "language_model" else max(batch, _EVAL_BATCH)
        return self._placement.rows(most)

    def _write(self, done: int, split: str, values: Mapping[str, float]) -> None:
        self._sink.write({"step": done, "split": split, **values})
        self._metrics.update({f"{split}/{name}": float(value) for name, value in values.items()})


@once(2)
def _dataset(config: DataConfig) -> Dataset:
    """Returns the data set; the same object for all runs of a sweep."""
    return data.load(config)
