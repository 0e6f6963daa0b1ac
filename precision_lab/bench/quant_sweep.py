"""Arms of a sweep over weight widths: seven widths that are data to one program, beside one program of one width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from precision_lab import models
from precision_lab.bench.arms import Arm, Problem, State, batch_of, compiled_anew, traced_anew
from precision_lab.bench.interleaved import Timing, time_alternating
from precision_lab.nn import apply_policy
from precision_lab.quant import quantizer_params
from precision_lab.training.program import cross_entropy

WIDTHS = range(2, 9)
ONE, SEVEN = "one width", "seven widths as data"
PREPARED = f"preparing {SEVEN}", f"preparing {ONE}"
_ROUNDS = 3


def sweeps(problem: Problem) -> dict[str, Callable[[], Arm]]:
    """Returns the step of one width, which is the baseline, and the step that takes any width with its batch."""
    return {ONE: lambda: _step(problem, as_data=False), SEVEN: lambda: _step(problem, as_data=True)}


def prepared(problem: Problem) -> dict[tuple[str, str], Timing]:
    """Returns what it takes to trace and compile a sweep of seven widths, against one width."""
    arms = {name: make() for name, make in sweeps(problem).items()}
    calls = (lambda arm=arms[name]: compiled_anew(traced_anew(arm)) for name in (ONE, SEVEN))
    return {PREPARED: time_alternating(PREPARED[0], *calls, rounds=_ROUNDS)}


def with_width(batch: Any, bits: int) -> Any:
    """Returns a batch that says how wide weights are."""
    return {**batch, "weight": quantizer_params(f"int{bits}@channel")}


def _step(problem: Problem, *, as_data: bool) -> Arm:
    """Returns a training step with Adam, weights in 4 bits unless their width comes with the batch."""
    graphdef, params = nnx.split(models.build(problem.config, problem.spec, 0))
    policy = "weight=int4@channel,activation=int8@token,execution=simulated"
    tx = optax.adam(1e-3)

    def call(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(inputs)  # pyright: ignore[reportCallIssue]

    def step(state: State, batch: Any) -> tuple[State, jax.Array, None]:
        numbers = {"weight": batch["weight"]} if as_data else None

        def loss_of(params: Any) -> jax.Array:
            logits = apply_policy(call, policy, numbers=numbers)(params, batch["inputs"])
            return jnp.mean(cross_entropy(logits, batch["targets"]))

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), None, opt_state), loss, None

    batch = batch_of(problem)
    return Arm(step, State(params, None, tx.init(params)), with_width(batch, 4) if as_data else batch)
