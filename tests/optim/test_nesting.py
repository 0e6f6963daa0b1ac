"""loss_scaling refuses to stand inside an optax wrapper, and says how to write it."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from precision_lab.optim import (
    DynamicLossScale,
    StaticLossScale,
    current_loss_scale,
    kahan,
    loss_scaling,
    master_weights,
    nearest_rounding,
    scaling,
    stochastic_rounding,
)

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
    """Checks 21 and 24."""
    tx, message = WRONG[name]

    with pytest.raises(ValueError, match=message):
        how(tx.init)(PARAMS)


def test_stock_multi_steps_freezes_after_one_overflow():
    """Check 24. Why it is refused: optax's accumulator never loses the infinity, so every later step is skipped."""
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


def test_multi_steps_around_loss_scaling_would_freeze_the_parameters(monkeypatch):
    """Check 24: without the refusal, one overflow stops training and drives the scale to its floor."""
    monkeypatch.setattr(scaling, "refuse_optax_around", lambda name: None)
    tx = optax.MultiSteps(loss_scaling(optax.sgd(1.0), DynamicLossScale(init=8.0)), 2)
    params = jnp.zeros(())
    state = tx.init(params)
    update = jax.jit(tx.update)
    scales = []
    for grad in (jnp.inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        updates, state = update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
        scales.append(float(current_loss_scale(state)))

    assert float(params) == 0.0
    assert scales[1::2] == [4.0, 2.0, 1.0, 1.0]


ROUNDINGS = {
    "master_weights": master_weights,
    "nearest_rounding": nearest_rounding,
    "stochastic_rounding": lambda inner: stochastic_rounding(inner, jax.random.key(0)),
    "kahan": kahan,
}
LOW = {"w": jnp.ones(2, jnp.bfloat16)}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_roundings_refuse_what_belongs_inside_them(name):
    wrapped = ROUNDINGS[name](optax.sgd(1.0))
    wrong = {
        rf"inside optax.chain.*Write {name}\(optax.chain": optax.chain(optax.clip_by_global_norm(1.0), wrapped),
        rf"{name} stands inside optax.chain": loss_scaling(optax.chain(wrapped, optax.scale(0.5))),
        rf"inside optax.named_chain.*{name}\(optax.named_chain": optax.named_chain(("all", wrapped)),
        rf"apply_if_finite.*loss_scaling\({name}\(inner\)": optax.apply_if_finite(wrapped, 3),
        rf"hyperparameters in 16 bits.*{name}\(optax.inject_hyperparams": optax.inject_hyperparams(
            lambda rate: ROUNDINGS[name](optax.sgd(rate))
        )(1.0),
    }
    for message, tx in wrong.items():
        with pytest.raises(ValueError, match=message):
            tx.init(LOW)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_roundings_stand_inside_multi_steps_masked_and_partition(name):
    wrapped = ROUNDINGS[name](optax.chain(optax.clip_by_global_norm(9.0), optax.inject_hyperparams(optax.sgd)(0.5)))
    params = {"w": jnp.ones(2, jnp.bfloat16), "frozen": jnp.ones(2, jnp.bfloat16)}
    split = optax.partition({"go": wrapped, "stay": optax.set_to_zero()}, {"w": "go", "frozen": "stay"})
    masked = optax.masked(wrapped, {"w": True, "frozen": False})

    for inner in (optax.MultiSteps(wrapped, 2), masked, split):
        tx = loss_scaling(inner, StaticLossScale(2.0))
        state, after = tx.init(params), params
        for _ in range(2):
            updates, state = tx.update({"w": jnp.ones(2), "frozen": jnp.zeros(2)}, state, after)
            after = optax.apply_updates(after, updates)

        moved = 0.25 if isinstance(inner, optax.MultiSteps) else 0.5
        assert after["w"].tolist() == [1 - moved] * 2
        assert after["frozen"].tolist() == [1.0] * 2


def test_hyperparameters_in_16_bits_are_refused():
    """Stock inject_hyperparams stores b2 = 0.999 as 1 for bfloat16 parameters, and Adam divides by zero."""
    adamw = optax.inject_hyperparams(optax.adamw)(1e-3)
    message = r"keeps .*'b2'.* in bfloat16.*Put master_weights.* around it, inside loss_scaling"

    assert float(adamw.init(LOW).hyperparams["b2"]) == 1.0
    with pytest.raises(ValueError, match=message):
        loss_scaling(adamw).init(LOW)
    with pytest.raises(ValueError, match=message):
        loss_scaling(optax.chain(optax.clip(1.0), adamw)).init(LOW)
    assert loss_scaling(master_weights(adamw)).init(LOW).inner.inner.hyperparams["b2"].dtype == jnp.float32
