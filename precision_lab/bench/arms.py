"""Arms of the mixed-precision benchmark: one training step each, of the same model, initialisation and batch.

A step is loss, gradient, AdamW and `optax.apply_updates`. Arms differ in how they get their precision, and in nothing
else: a policy of ours on the untouched model, jmp's casts at entry, or Flax's own `dtype=`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from precision_lab import models
from precision_lab.models import DataSpec, ModelConfig
from precision_lab.models.config import ConvNetConfig, TransformerConfig
from precision_lab.nn import apply_policy
from precision_lab.optim import commit, loss_scaling, master_weights, value_and_scaled_grad
from precision_lab.telemetry import observed
from precision_lab.training.program import cross_entropy


class Problem(NamedTuple):
    """A model and a batch: config, what the data asks of the model, and examples a step."""

    config: ModelConfig
    spec: DataSpec
    batch: int


PROBLEMS = {
    "transformer": Problem(
        TransformerConfig(depth=2, width=512, heads=8), DataSpec("language_model", (128,), 256), batch=16
    ),
    "convnet": Problem(
        ConvNetConfig(channels=(32, 64, 128), norm="batch"), DataSpec("classification", (32, 32, 3), 10), batch=64
    ),
}
SMALL = {
    "transformer": Problem(TransformerConfig(depth=1, width=16, heads=2), DataSpec("language_model", (8,), 32), 2),
    "convnet": Problem(ConvNetConfig(channels=(4, 4), norm="batch"), DataSpec("classification", (8, 8, 3), 10), 2),
}


def chosen(problems: Mapping[str, Problem], model: str) -> dict[str, Problem]:
    """Returns the problem of a model by its name, or all under "both".

    Raises:
      ValueError: there is no such model.
    """
    if model not in (*problems, "both"):
        raise ValueError(f"model must be one of {', '.join(problems)}, both; got '{model}'.")
    return {name: problem for name, problem in problems.items() if model in (name, "both")}


class State(NamedTuple):
    """What a step is given, donated, and returns: parameters, other variables, optimizer state."""

    params: Any
    rest: Any
    opt_state: Any


class Arm(NamedTuple):
    """A step `(state, batch) -> (state, loss, observation or None)`, and what it starts with."""

    step: Callable[[State, Any], tuple[State, Any, Any]]
    state: State
    batch: Any


Change = Callable[[Any], Any]


def arms(problem: Problem) -> dict[str, Callable[[], Arm]]:
    """Returns all arms by name, each to be made when it is its turn."""

    def under(policy: str) -> Callable[[], Arm]:
        return lambda: training(problem, model=lambda model: apply_policy(model, policy))

    def watched(when: Callable[..., Any] | None = None, looks: bool = True) -> Callable[[], Arm]:
        return lambda: _observed(under("float32")(), when, looks)

    return {
        "float32": lambda: training(problem),
        **{f"policy {name}": under(name) for name in ("float32", "bfloat16_mixed", "bfloat16_autocast")},
        "jmp bfloat16": lambda: _with_jmp(problem),
        "Flax dtype=bfloat16": lambda: training(problem, model=lambda model: _with_dtype(model, (nnx.Module,))),
        "loss scaling + master weights": lambda: _with_masters(problem),
        "observed every step": watched(),
        "observed when=, looking": watched(lambda _, batch: batch["look"]),
        "observed when=, not looking": watched(lambda _, batch: batch["look"], looks=False),
        "update: adamw": lambda: _update(problem, optax.adamw(1e-3), jnp.float32),
        "update: loss scaling": lambda: _update(problem, loss_scaling(optax.adamw(1e-3)), jnp.float32),
        "update: loss scaling + master weights": lambda: _update(problem, _masters(), jnp.bfloat16),
    }


def training(
    problem: Problem,
    *,
    model: Change = lambda model: model,
    enter: Change = lambda given: given,
    store: Change = lambda params: params,
    tx: Any = None,
    scaled: bool = False,
) -> Arm:
    """Returns the arm that trains `problem`.

    Args:
      problem: model and batch.
      model: what is done to the model, which holds shapes instead of arrays.
      enter: what is done to (params, inputs) at the entry of the loss.
      store: what is done to the parameters after the optimizer's `init`.
      tx: optimizer; AdamW unless given.
      scaled: whether `tx` scales the loss.
    """
    graphdef = nnx.split(model(nnx.eval_shape(lambda: models.build(problem.config, problem.spec, 0))))[0]
    tx = optax.adamw(1e-3) if tx is None else tx

    def loss_of(params: Any, rest: Any, batch: Any) -> tuple[jax.Array, Any]:
        params, inputs = enter((params, batch["inputs"]))
        called = nnx.merge(graphdef, params, rest)
        loss = jnp.mean(cross_entropy(called(inputs), batch["targets"]))  # pyright: ignore[reportCallIssue]
        return loss, _taken_apart(called)[1]

    def step(state: State, batch: Any) -> tuple[State, jax.Array, None]:
        params, rest, opt_state = state
        if scaled:
            (loss, new_rest), grads = value_and_scaled_grad(loss_of, has_aux=True)(opt_state, params, rest, batch)
        else:
            (loss, new_rest), grads = jax.value_and_grad(loss_of, has_aux=True)(params, rest, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        new_rest = commit(opt_state, new_rest, rest) if scaled else new_rest
        return State(optax.apply_updates(params, updates), new_rest, opt_state), loss, None

    params, rest = _fresh(problem)
    opt_state = tx.init(params)
    return Arm(step, State(store(params), rest, opt_state), batch_of(problem))


def call_of(arm: Arm) -> Callable[[], Any]:
    """Returns the call of a compiled step, which goes on from its last state and returns its loss."""
    compiled = jax.jit(arm.step, donate_argnums=0).lower(arm.state, arm.batch).compile()
    state = arm.state

    def call() -> Any:
        nonlocal state
        state, loss, _ = jax.block_until_ready(compiled(state, arm.batch))
        return loss

    return call


def traced_anew(arm: Arm) -> Any:
    """Returns a step traced as in a process that has traced nothing yet."""
    jax.clear_caches()
    return jax.jit(arm.step, donate_argnums=0).trace(arm.state, arm.batch)


def compiled_anew(traced: Any) -> Any:
    """Returns a traced step compiled, as if for the first time: JAX keeps what it has lowered and compiled."""
    jax.clear_caches()
    return traced.lower().compile()


def _with_jmp(problem: Problem) -> Arm:
    """Returns jmp's way: parameters and inputs cast at entry, the logits cast back (the loss does it).

    Layers that do not follow their operands' dtype are told it: the embedding, which keeps that of its
    initialisation, and batch normalisation, whose float32 statistics would widen all that comes after.
    """
    import jmp

    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    deaf = (nnx.Embed, nnx.BatchNorm)
    return training(problem, model=lambda model: _with_dtype(model, deaf), enter=policy.cast_to_compute)


def _with_masters(problem: Problem) -> Arm:
    """Returns the float32 step with parameters stored in bfloat16, widened at entry, and masters in the optimizer."""

    def widen(given: Any) -> Any:
        params, inputs = given
        return jax.tree.map(lambda p: p.astype(jnp.float32), params), inputs

    return training(problem, enter=widen, store=lambda params: _cast(params, jnp.bfloat16), tx=_masters(), scaled=True)


def _masters() -> optax.GradientTransformation:
    """Returns AdamW on float32 masters of bfloat16 parameters, under a dynamic loss scale."""
    return loss_scaling(master_weights(optax.adamw(1e-3), param_dtype=jnp.bfloat16))


def _observed(arm: Arm, when: Callable[..., Any] | None, looks: bool) -> Arm:
    """Returns an arm whose sites are observed; with `when` its batch says whether to look."""
    watched = observed(arm.step, when=when)

    def step(state: State, batch: Any) -> tuple[State, Any, Any]:
        (state, loss, _), seen = watched(state, batch)
        return state, loss, seen

    return arm._replace(step=step, batch={**arm.batch, "look": jnp.asarray(looks)})


def _update(problem: Problem, tx: Any, dtype: Any) -> Arm:
    """Returns an optimizer's update alone, of parameters stored and gradients computed in `dtype`."""

    def step(state: State, grads: Any) -> tuple[State, None, None]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), None, opt_state), None, None

    params, _ = _fresh(problem)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, dtype), params)
    opt_state = tx.init(params)
    return Arm(step, State(_cast(params, dtype), None, opt_state), grads)


def _cast(params: Any, dtype: Any) -> Any:
    """Returns parameters in `dtype`."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _with_dtype(model: nnx.Module, kinds: tuple[type, ...]) -> nnx.Module:
    """Returns a model whose layers of these kinds compute in bfloat16, as if constructed with `dtype=`, in place."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, kinds) and hasattr(module, "dtype"):
            module.dtype = jnp.bfloat16  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _fresh(problem: Problem) -> tuple[Any, Any]:
    """Returns newly made (parameters, other variables), always the same, as nested dicts."""
    return _taken_apart(models.build(problem.config, problem.spec, 0))


def _taken_apart(model: Any) -> tuple[Any, Any]:
    """Returns (parameters, other variables) as nested dicts of arrays."""
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def batch_of(problem: Problem) -> dict[str, jax.Array]:
    """Returns one batch, always the same."""
    rng, shape = np.random.default_rng(0), (problem.batch, *problem.spec.input_shape)
    text = problem.spec.task == "language_model"
    inputs = rng.integers(problem.spec.num_classes, size=shape) if text else rng.standard_normal(shape, np.float32)
    targets = rng.integers(problem.spec.num_classes, size=shape if text else problem.batch)
    return {
        "inputs": jnp.asarray(inputs, jnp.int32 if text else jnp.float32),
        "targets": jnp.asarray(targets, jnp.int32),
    }
