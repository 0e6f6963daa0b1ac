"""The compiled part of training: initialisation, one step, evaluation of one batch.

A program is built once for all runs whose configs differ only in what is passed as an argument: the seed, and the
numbers of the optimizer, the loss scale and the policy's quantizers. All use of NNX in training is here.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from precision_lab import models
from precision_lab.models import DataSpec, ModelConfig
from precision_lab.nn import add_lora, apply_policy
from precision_lab.nn.nnx_policy import set_numbers
from precision_lab.optim import (
    current_loss_scale,
    scale_loss,
    skipped_steps,
    step_was_applied,
    sync,
    zero_second_moment_fraction,
)
from precision_lab.policy import Policy
from precision_lab.training.config import RunConfig
from precision_lab.training.numbers import Hyper, hyper, static_part
from precision_lab.training.once import once
from precision_lab.training.optimizer import build_optimizer
from precision_lab.training.qat import has_state
from precision_lab.training.state import NEVER, TrainState
from precision_lab.training.states import model_with_states, shapes_of_inputs, states_at_start

_PROGRAMS_KEPT = 64
_ADAPTERS = 0x10AA  # stream of random numbers, apart from those of the initialisation


class Program(NamedTuple):
    """Jitted functions of one static config.

    Attributes:
      fresh: seed -> (params, model_state), float32. They depend on the seed and the model alone, not on the policy.
      start: (params, model_state, hyper, seed, inputs) -> TrainState before the first step; inputs are those of the
        first batch where quantizers start from them, else None: `states.first_inputs`.
      init: (seed, hyper, inputs) -> TrainState, `start` of what is `fresh`.
      step: (state, batch, hyper) -> (state, metrics), donating the state; metrics are float32 and int32 scalars.
      evaluate: (state, batch, weights) -> sums over the batch of weighted "loss", "correct", and of "weight".
      state_shapes: the state as ShapeDtypeStructs.
      batch_shapes: a training batch as ShapeDtypeStructs.
      spec: what the data are.
    """

    fresh: Callable[[Any], tuple[Any, Any]]
    start: Callable[[Any, Any, Hyper, jax.Array, Any], TrainState]
    init: Callable[..., TrainState]
    step: Any
    evaluate: Any
    state_shapes: TrainState
    batch_shapes: Mapping[str, jax.ShapeDtypeStruct]
    spec: DataSpec


def program_for(config: RunConfig, spec: DataSpec) -> Program:
    """Returns the program that trains `config` on data of `spec`, compiled or not; equal ones are built once.

    Configs with the same `static_part` share the compiled functions; `evaluate` has the quantizers of `config`.

    Raises:
      ValueError: the model cannot learn such data.
    """
    program = _build(static_part(config), spec)  # pyright: ignore[reportArgumentType] (frozen: hashable)
    quantizers = hyper(config).quantizers
    return program._replace(evaluate=functools.partial(program.evaluate, quantizers=quantizers))


def check_program(program: Program, config: RunConfig) -> None:
    """Traces one step, or an evaluation where there are none, without running or compiling anything.

    Raises:
      ValueError: a rule of the policy matches no site of the model.
    """
    if config.train.steps == 0:
        weights = jax.ShapeDtypeStruct((config.data.batch,), jnp.int32)
        jax.eval_shape(program.evaluate, program.state_shapes, program.batch_shapes, weights)
        return
    try:
        after, _ = program.step.eval_shape(program.state_shapes, program.batch_shapes, hyper(config))
    except ValueError:
        # The program knows no numbers; that of this config alone says the same in the words of its policy.
        whole = model_under(config, program.spec, Policy.parse(config.policy))
        alone = functools.partial(_step, static_part(config), whole)
        jax.eval_shape(alone, program.state_shapes, program.batch_shapes, hyper(config)._replace(quantizers={}))
        raise
    before = jax.tree.map(lambda x: (x.shape, x.dtype), program.state_shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == before, "a step must keep shapes and dtypes"


class Model(NamedTuple):
    """A model under its policy, without its arrays."""

    train: nnx.GraphDef
    eval: nnx.GraphDef


@once(_PROGRAMS_KEPT)
def _build(config: RunConfig, spec: DataSpec) -> Program:
    policy = Policy.parse(config.policy)
    model = model_under(config, spec, policy)
    fresh = _initializer(config.model, spec)  # pyright: ignore[reportArgumentType]
    start = jax.jit(functools.partial(_start, config, policy, spec))

    def init(seed: int, numbers: Hyper, inputs: Any = None) -> TrainState:
        # Two programs: that of `fresh` is the same whatever the policy, so that paired runs start from equal bits.
        root = jnp.asarray(seed, jnp.uint32)
        return start(*fresh(root), numbers, root, inputs)

    numbers, shapes = hyper(config), batch_shapes(spec, config.data.batch)
    return Program(
        fresh=fresh,
        start=start,
        init=init,
        step=jax.jit(functools.partial(_step, config, model), donate_argnums=0),
        evaluate=jax.jit(functools.partial(evaluate_batch, model)),
        state_shapes=jax.eval_shape(init, 0, numbers, shapes_of_inputs(config, shapes)),
        batch_shapes=shapes,
        spec=spec,
    )


def model_under(config: RunConfig, spec: DataSpec, policy: Policy) -> Model:
    """Returns the definition of a run's model under `policy`, for training and for evaluation, with its adapters.

    Under the run's own policy it has the states of its quantizers too.
    """
    if has_state(str(policy)):
        model = model_with_states(config, spec, batch_shapes(spec, config.data.batch)["inputs"])
    else:
        model = apply_policy(nnx.eval_shape(lambda: models.build(config.model, spec, 0)), policy)
    if config.lora is not None:
        model = nnx.eval_shape(lambda: with_adapters(models.build(config.model, spec, 0), config, spec, policy, 0))
    model.train()
    train = nnx.split(model)[0]
    model.eval()
    return Model(train, nnx.split(model)[0])


@once(_PROGRAMS_KEPT)
def _initializer(config: ModelConfig, spec: DataSpec) -> Callable[[Any], tuple[Any, Any]]:
    """Returns the jitted function from a seed to the model's float32 parameters and its other state."""
    return jax.jit(lambda seed: take_apart(models.build(config, spec, seed)))


def take_apart(model: nnx.Module) -> tuple[Any, Any]:
    """Returns (parameters, other state) as nested dicts of arrays."""
    return _split(model, nnx.Param)


def _split(model: nnx.Module, trained: Any) -> tuple[Any, Any]:
    """Returns the variables of a type, and all others, as nested dicts of arrays."""
    _, chosen, rest = nnx.split(model, trained, ...)
    return nnx.to_pure_dict(chosen), nnx.to_pure_dict(rest)


def _trained(config: RunConfig) -> Any:
    """Returns the type of the variables that a run trains; the others, frozen weights too, are its model state."""
    return nnx.Param if config.lora is None else nnx.LoRAParam


def with_adapters(model: nnx.Module, config: RunConfig, spec: DataSpec, policy: Policy, seed: Any) -> nnx.Module:
    """Returns a model under a policy with the adapters that a run trains, as they are before the first step."""
    assert config.lora is not None
    options = {"rank": config.lora.rank, "alpha": config.lora.alpha, "paths": config.lora.paths, "policy": policy}
    key = jax.random.fold_in(jax.random.key(seed), _ADAPTERS)
    return add_lora(model, batch_shapes(spec, 1)["inputs"], key=key, **options)


def _start(
    config: RunConfig,
    policy: Policy,
    spec: DataSpec,
    params: Any,
    model_state: Any,
    numbers: Hyper,
    seed: jax.Array,
    inputs: Any,
) -> TrainState:
    """Returns the state before the first step."""
    if config.lora is not None:
        bare = nnx.merge(model_under(config.model_copy(update={"lora": None}), spec, policy).train, params, model_state)
        params, model_state = _split(with_adapters(bare, config, spec, policy, seed), nnx.LoRAParam)
    params, model_state = states_at_start(config, spec, params, model_state, inputs)
    stored = policy.cast_to_param(params)
    # Masters start from the originals; what is updated in place, and what it has lost, has the dtype it is stored in.
    given = params if config.master_weights else stored
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=stored,
        model_state=model_state,
        opt_state=build_optimizer(config, numbers, seed).init(given),
        first_nonfinite=jnp.full((), NEVER, jnp.int32),
    )


def _step(
    config: RunConfig, model: Model, state: TrainState, batch: Mapping[str, jax.Array], numbers: Hyper
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one update, and what there is to say about it."""

    def scaled_loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        called = nnx.merge(model.train, params, state.model_state)
        set_numbers(called, numbers.quantizers)
        loss = jnp.mean(cross_entropy(called(batch["inputs"]), batch["targets"]))  # type: ignore[operator]
        set_numbers(called, {})
        return scale_loss(loss * numbers.loss_factor, state.opt_state), (loss, _split(called, _trained(config))[1])

    grads, (loss, model_state) = jax.grad(scaled_loss, has_aux=True)(state.params)
    if config.train.on_nonfinite == "skip":  # Gradients may be finite where the loss is not.
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(loss), g, jnp.nan), grads)
    optimizer = build_optimizer(config, numbers)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if config.master_weights:
        params = sync(params, opt_state)
    applied = step_was_applied(opt_state)
    after = TrainState(
        step=state.step + 1,
        params=params,
        # A skipped step leaves no trace in batch statistics either.
        model_state=jax.tree.map(lambda new, old: jnp.where(applied, new, old), model_state, state.model_state),
        opt_state=opt_state,
        first_nonfinite=_first_nonfinite(state, applied & ~jnp.isfinite(loss)),
    )
    measured = _metrics(state, after, grads, loss, numbers)
    if config.optim.has_low_bit_second_moments:
        measured["zero_second_moment_fraction"] = zero_second_moment_fraction(opt_state)
    return after, measured


def _metrics(
    before: TrainState, after: TrainState, grads: Any, loss: jax.Array, numbers: Hyper
) -> dict[str, jax.Array]:
    """Returns what there is to say about a step; `grads` as they left backpropagation, scaled."""
    loss_scale = current_loss_scale(before.opt_state)
    return {
        "loss": loss,
        "grad_norm": _norm(grads, loss_scale, numbers.loss_factor),
        "zero_grad_fraction": _share(jax.tree.map(lambda g: g == 0, grads)),
        "unchanged_fraction": _share(jax.tree.map(_same_bits, after.params, before.params)),
        "loss_scale": loss_scale,
        "skipped_steps": skipped_steps(after.opt_state),
        "first_nonfinite": after.first_nonfinite,
    }


def evaluate_batch(
    model: Model,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    weights: jax.Array,
    quantizers: Mapping[str, Any] = types.MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Returns sums over a batch whose examples count as `weights` (batch,) says: 1, or 0 for padding.

    Of "loss", "correct" (the largest logit is the target's), "nonfinite" (the loss is not finite), and "weight".
    """
    called = nnx.merge(model.eval, state.params, state.model_state)
    set_numbers(called, quantizers)
    logits = called(batch["inputs"])  # type: ignore[operator]
    losses = cross_entropy(logits, batch["targets"])
    hits = jnp.argmax(logits, axis=-1) == batch["targets"]
    counts = jnp.broadcast_to(weights.reshape(-1, *(1,) * (losses.ndim - 1)), losses.shape)
    return {
        "loss": jnp.sum(jnp.where(counts > 0, losses, 0)),
        "correct": jnp.sum(hits & (counts > 0)),
        "nonfinite": jnp.sum(~jnp.isfinite(losses) & (counts > 0)),
        "weight": jnp.sum(counts),
    }


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the float32 loss of each target, whatever the dtype of `logits`, outside any policy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def _first_nonfinite(state: TrainState, bad: jax.Array) -> jax.Array:
    """Returns the number of the first bad step, this one included."""
    return jnp.where(bad & (state.first_nonfinite == NEVER), state.step + 1, state.first_nonfinite)


def _norm(tree: Any, loss_scale: jax.Array, loss_factor: jax.Array) -> jax.Array:
    """Returns the global norm, in float32, of gradients without the factors on the loss.

    The factors go first, one after the other: squares of scaled gradients, and the product of the factors, may be too
    small or too large for float32.
    """
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32) / loss_scale / loss_factor, tree))


def _share(flags: Any) -> jax.Array:
    """Returns the share of True among all elements of a tree."""
    leaves = jax.tree.leaves(flags)
    return sum(jnp.sum(x, dtype=jnp.float32) for x in leaves) / jnp.float32(max(1, sum(x.size for x in leaves)))


def _same_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns elementwise whether two arrays hold the same bits; -0.0 differs from 0.0, a NaN from no equal NaN."""
    bits = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    return jax.lax.bitcast_convert_type(a, bits) == jax.lax.bitcast_convert_type(b, bits)


def batch_shapes(spec: DataSpec, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a training batch looks like."""
    shape = (batch, *spec.input_shape)
    return {
        "inputs": jax.ShapeDtypeStruct(shape, jnp.float32 if spec.task == "classification" else jnp.int32),
        "targets": jax.ShapeDtypeStruct(shape if spec.task == "language_model" else (batch,), jnp.int32),
    }
