"""loss_scaling refuses to stand inside an optax wrapper, and says how to write it."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from precision_lab.optim import StaticLossScale, current_loss_scale, loss_scaling, master_weights

PARAMS = {"w": jnp.zeros(2)}
SCALED = loss_scaling(optax.sgd(1.0), StaticLossScale(1024.0))
WRONG = {
    "chain": (optax.chain(optax.clip_by_global_norm(1.0), SCALED), r"inside optax.chain.*loss_scaling\(optax.chain"),
    "MultiSteps": (optax.MultiSteps(SCALED, 4), r"inside optax.MultiSteps.*loss_scaling\(optax.MultiSteps\(inner, k"),
    "apply_if_finite": (optax.apply_if_finite(SCALED, 3), "inside optax.apply_if_finite.*by itself"),
    "masked": (optax.masked(SCALED, {"w": True}), "inside optax.masked"),
    "deep": (optax.chain(master_weights(SCALED)), "inside optax.chain"),
    "twice": (loss_scaling(SCALED), "inside another loss_scaling"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("how", [lambda init: init, jax.jit], ids=["eager", "jit"])
def test_wrong_nestings_are_refused(name, how):
    tx, message = WRONG[name]

    with pytest.raises(ValueError, match=message):
        how(tx.init)(PARAMS)


def test_stock_multi_steps_freezes_after_one_overflow():
    """Why it is refused: optax's accumulator never loses the infinity, so every later step is skipped."""
    tx = optax.MultiSteps(optax.apply_if_finite(optax.sgd(1.0), 100), 2)
    params = jnp.zeros(())
    state = tx.init(params)
    for grad in (jnp.inf, 1.0, 1.0, 1.0, 1.0, 1.0):
        updates, state = tx.update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)

    assert float(params) == 0.0
    assert not bool(jnp.isfinite(state.acc_grads))


def test_what_hands_gradients_on_unchanged_may_stand_around_it():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    optimizer = nnx.Optimizer(model, SCALED, wrt=nnx.Param)
    states = jax.vmap(SCALED.init)({"w": jnp.zeros((3, 2))})
    inside = master_weights(SCALED).init(PARAMS)

    assert float(current_loss_scale(optimizer.opt_state)) == 1024.0
    assert states.loss_scale.shape == (3,)
    assert float(current_loss_scale(inside)) == 1024.0
