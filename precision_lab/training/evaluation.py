"""Evaluation of a state on a split, under the policy of the run and under others."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from precision_lab.data import Split
from precision_lab.models import DataSpec
from precision_lab.nn.weight_error import relative_mse, weight_error
from precision_lab.policy import Policy
from precision_lab.training.config import RunConfig
from precision_lab.training.numbers import static_part
from precision_lab.training.once import once
from precision_lab.training.program import Program, batch_shapes, evaluate_batch, model_under
from precision_lab.training.qat import weights_have_error
from precision_lab.training.state import TrainState
from precision_lab.training.states import bare

_EVALUATORS_KEPT = 64


def evaluate(
    program: Program, state: TrainState, split: Split, batch: int, limit: int | None = None
) -> dict[str, float]:
    """Returns means over the first `limit` examples of `split`, all if None.

    Args:
      program: what trains the run.
      state: whose parameters to evaluate.
      split: examples.
      batch: how many to evaluate at once; the last batch is padded, so that there is one shape to compile.
      limit: how many examples to use.

    Returns:
      "loss" (nats), "accuracy", and "nonfinite_fraction", the share of targets whose loss is not finite.
    """
    size = len(split) if limit is None else min(limit, len(split))
    sums = []
    for start in range(0, size, batch):
        indices = np.arange(start, start + batch)
        weights = (indices < size).astype(np.int32)
        sums.append(program.evaluate(state, split.take(np.minimum(indices, size - 1)), weights))
    fetched = jax.device_get(sums)
    loss, correct, bad, weight = (
        sum(part[name].item() for part in fetched) for name in ("loss", "correct", "nonfinite", "weight")
    )
    return {"loss": loss / weight, "accuracy": correct / weight, "nonfinite_fraction": bad / weight}


def weight_errors(config: RunConfig, spec: DataSpec) -> dict[str, Callable[[TrainState], dict[str, float]]]:
    """Returns by split, "weights" and "weights_<name>", what measures the error of the weights that a policy quantizes.

    Its "relative_mse" is the squared error of all of them over the sum of their squares, both of the weights as that
    policy stores them. Not for a policy whose quantizers have a state: their scales are no function of the weights.
    """
    policies = {"weights": config.policy, **{f"weights_{name}": policy for name, policy in config.evals.items()}}
    static = static_part(config)
    return {
        split: functools.partial(_measured, _weight_measure(static, spec, policy))  # pyright: ignore[reportArgumentType]
        for split, policy in policies.items()
        if weights_have_error(policy)
    }


def _measured(measure: Any, state: TrainState) -> dict[str, float]:
    return {"relative_mse": measure(state).item()}


def under_other_policies(program: Program, config: RunConfig, spec: DataSpec) -> dict[str, Program]:
    """Returns by name, for each further policy that a run is evaluated under, the program that evaluates under it."""
    static = static_part(config)
    return {
        name: program._replace(evaluate=_evaluator(static, spec, policy))  # pyright: ignore[reportArgumentType]
        for name, policy in config.evals.items()
    }


def check_evaluations(program: Program, config: RunConfig, spec: DataSpec) -> None:
    """Traces an evaluation under each further policy, without running or compiling anything.

    Raises:
      ValueError: a rule of one matches no site of the model.
    """
    weights = jax.ShapeDtypeStruct((config.data.batch,), np.int32)
    for name, other in under_other_policies(program, config, spec).items():
        try:
            other.evaluate.eval_shape(program.state_shapes, program.batch_shapes, weights)
        except ValueError as error:
            raise ValueError(f"evals.{name}: {error}") from None


@once(_EVALUATORS_KEPT)
def _weight_measure(config: RunConfig, spec: DataSpec, policy: str) -> Any:
    """Returns the jitted function from a state to the relative squared error of the weights that a policy quantizes."""
    parsed = Policy.parse(policy)
    model = model_under(config, spec, Policy.parse("float32"))
    example = batch_shapes(spec, 1)["inputs"]

    def measured(state: TrainState) -> jax.Array:
        stored = parsed.cast_to_param(bare(state.params))
        return relative_mse(weight_error(nnx.merge(model.eval, stored, bare(state.model_state)), parsed, example))

    return jax.jit(measured)


@once(_EVALUATORS_KEPT)
def _evaluator(config: RunConfig, spec: DataSpec, policy: str) -> Any:
    """Returns the jitted function that evaluates a batch under another policy, as `Program.evaluate` does."""
    parsed = Policy.parse(policy)
    model = model_under(config, spec, parsed)

    def evaluated(state: TrainState, batch: Any, weights: jax.Array) -> dict[str, jax.Array]:
        params, rest = parsed.cast_to_param(bare(state.params)), bare(state.model_state)
        stored = dataclasses.replace(state, params=params, model_state=rest)
        return evaluate_batch(model, stored, batch, weights)

    return jax.jit(evaluated)
