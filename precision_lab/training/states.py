"""The quantizers of a run that have a state: the model that holds it, and what there is without it."""

import functools
from typing import Any

import jax
from flax import nnx

from precision_lab import models
from precision_lab.models import DataSpec
from precision_lab.nn import prepare_qat
from precision_lab.nn.quantizer_states import STATES
from precision_lab.training.config import RunConfig
from precision_lab.training.qat import schedule


def prepared(model: nnx.Module, config: RunConfig, inputs: Any) -> nnx.Module:
    """Returns a run's model with the states of its quantizers, which start from the weights and a batch of inputs."""
    said = schedule(config)
    assert said is not None
    return prepare_qat(model, config.policy, inputs, **said.model_dump())


def states_at_start(config: RunConfig, spec: DataSpec, params: Any, model_state: Any, inputs: Any) -> tuple[Any, Any]:
    """Returns parameters and other state with what quantizers start with; as given where these have no state."""
    if schedule(config) is None:
        return params, model_state
    plain = nnx.eval_shape(lambda: models.build(config.model, spec, 0))
    model = prepared(nnx.merge(nnx.split(plain)[0], params, model_state), config, inputs)
    _, own, rest = nnx.split(model, nnx.Param, ...)
    return nnx.to_pure_dict(own), nnx.to_pure_dict(rest)


def bare(tree: Any) -> Any:
    """Returns parameters, or other state, as the model has them without its quantizers."""
    return {name: value for name, value in tree.items() if name != STATES}


def first_inputs(config: RunConfig, batches: Any) -> Any:
    """Returns the inputs of a run's first batch if its quantizers start from them, else None."""
    return None if schedule(config) is None else batches[0]["inputs"]


def shapes_of_inputs(config: RunConfig, shapes: Any) -> Any:
    """Returns the shapes of `first_inputs`, from those of a batch."""
    return None if schedule(config) is None else shapes["inputs"]


def model_with_states(config: RunConfig, spec: DataSpec, shape: jax.ShapeDtypeStruct) -> nnx.Module:
    """Returns a run's model with the states of its quantizers, all of it shapes alone."""

    def built(inputs: jax.Array) -> nnx.Module:
        return prepared(models.build(config.model, spec, 0), config, inputs)

    return nnx.eval_shape(functools.partial(built), shape)
