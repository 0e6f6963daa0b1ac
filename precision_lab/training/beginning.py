"""The state in which a run begins: initialised from its seed, or with the final parameters of another run."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from precision_lab.models import DataSpec
from precision_lab.nn import merge_lora
from precision_lab.nn.nnx_policy import replace_params
from precision_lab.nn.weight_error import quantized_weights
from precision_lab.optim import full_precision
from precision_lab.policy import Policy
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.config import RunConfig
from precision_lab.training.numbers import hyper
from precision_lab.training.program import Program, batch_shapes, model_under, program_for, take_apart
from precision_lab.training.state import TrainState
from precision_lab.training.states import bare, first_inputs
from precision_lab.training.transforming import check_transforms, transformed


class Beginning(NamedTuple):
    """The state before the first step, and what the audit of stored parameters counted; see `AUDITED`."""

    state: TrainState
    audit: dict[str, float]


def beginning(
    config: RunConfig, program: Program, spec: DataSpec, start_from: Path | None, batches: Any = None
) -> Beginning:
    """Returns how a run begins.

    Args:
      config: the run.
      program: what trains it.
      spec: what its data asks of the model.
      start_from: folder of the checkpoints of the run that it begins from, if any.
      batches: of training; quantizers that have a state start from the first.

    Raises:
      ValueError: the run begins from another whose final parameters are not there, or a transform does not fit.
    """
    inputs = first_inputs(config, batches)
    if config.start is None and not config.transforms:
        return Beginning(program.init(config.seed, hyper(config), inputs), {})
    params, model_state, audit = parameters_at_start(config, program, spec, start_from)
    seed = jnp.asarray(config.seed, jnp.uint32)
    return Beginning(program.start(params, model_state, hyper(config), seed, inputs), audit)


def parameters_at_start(
    config: RunConfig, program: Program, spec: DataSpec, start_from: Path | None
) -> tuple[Any, Any, dict[str, float]]:
    """Returns the float32 parameters and the other state that a run begins with, and the audit; see `beginning`."""
    fresh = config.start is None
    params, model_state = (
        program.fresh(jnp.asarray(config.seed, jnp.uint32)) if fresh else _final_parameters(config, spec, start_from)
    )
    params, audit = transformed(params, config.transforms, config.seed)
    return params, model_state, audit


def check_beginning(program: Program, config: RunConfig) -> None:
    """Raises ValueError if a transform does not fit the model."""
    if config.transforms:
        shapes, _ = jax.eval_shape(program.fresh, jax.ShapeDtypeStruct((), jnp.uint32))
        check_transforms(shapes, config.transforms)


def _final_parameters(config: RunConfig, spec: DataSpec, folder: Path | None) -> tuple[Any, Any]:
    """Returns the parameters, masters in float32, and the other state with which the run before ended.

    What its quantizers have learned is left out: those of this run start anew, from these parameters.
    """
    assert config.start is not None
    parent = config.start.run
    if parent is None:
        raise ValueError(
            f"start names arm '{config.start.arm}', which only an experiment can look up; give start.run, its config."
        )
    if folder is None:
        raise ValueError("a run with start begins from another run's checkpoints: give their folder as start_from.")
    with Checkpoints(folder, parent) as checkpoints:
        restored = checkpoints.restore(program_for(parent, spec).state_shapes)
    if restored is None or int(restored.state.step) != parent.train.steps:
        found = "no checkpoint" if restored is None else f"a checkpoint of step {int(restored.state.step)}"
        raise ValueError(
            f"the run that this one starts from has {found} in '{folder}', and not its last, of step "
            f"{parent.train.steps}. Delete that run's folder, and it is made again."
        )
    state: TrainState = restored.state
    if parent.lora is not None:
        return _merged(parent, spec, state)
    params = full_precision(state.params, state.opt_state) if parent.master_weights else state.params
    return jax.tree.map(lambda x: x.astype("float32"), bare(params)), bare(state.model_state)


def _merged(parent: RunConfig, spec: DataSpec, state: TrainState) -> tuple[Any, Any]:
    """Returns the weights that a run's adapters stood beside, as it multiplied them, with these added."""
    policy, example = Policy.parse(parent.policy), batch_shapes(spec, 1)["inputs"]
    model = nnx.merge(model_under(parent, spec, Policy.parse("float32")).eval, state.params, state.model_state)
    replace_params(model, quantized_weights(model, policy, example))
    return take_apart(merge_lora(model, example))
