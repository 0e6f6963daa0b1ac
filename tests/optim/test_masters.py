"""Master weights: the parameter is the cast of the master, and the master is what float32 training gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from precision_lab.optim import (
    DynamicLossScale,
    kahan,
    loss_scaling,
    master_weights,
    nearest_rounding,
    skipped_steps,
    step_was_applied,
    stochastic_rounding,
    sync,
)

LOW = [jnp.bfloat16, jnp.float16]


def train(tx, params, grad, steps):
    """Returns (params, state) after `steps` updates with a constant gradient, each in one jitted scan step."""

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.full_like(p, grad), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))((params, tx.init(params)))
    return params, state


def stepper(tx):
    """Returns one whole update as a function; XLA may fuse its product and sum, so both sides must be whole."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def normals(n=2**20, seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def assert_same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("in_place", [optax.sgd(1e-3), nearest_rounding(optax.sgd(1e-3))])
def test_bfloat16_stands_still_without_a_master_and_moves_with_one(in_place):
    """Check 29. A step of 1e-3 is under half an ulp of bfloat16 1.0, which is 2**-8."""
    one = jnp.ones((), jnp.bfloat16)

    with_master, state = train(master_weights(optax.sgd(1e-3)), one, -1.0, 1000)
    without, _ = train(in_place, one, -1.0, 1000)

    assert float(with_master) == 2.0
    assert float(state.master) == pytest.approx(2.00005, abs=1e-4)
    assert float(without) == 1.0


def test_float16_stands_still_without_a_master_and_moves_with_one():
    """Check 30."""
    one = jnp.ones((), jnp.float16)

    with_master, state = train(master_weights(optax.sgd(1e-4)), one, -1.0, 1000)
    without, _ = train(nearest_rounding(optax.sgd(1e-4)), one, -1.0, 1000)

    assert float(with_master) == pytest.approx(1.0996, abs=5e-5)
    assert float(state.master) == pytest.approx(1.10002, abs=1e-5)
    assert float(without) == 1.0


@pytest.mark.parametrize("dtype", LOW)
def test_master_is_the_float32_trajectory_and_the_parameter_its_cast(dtype):
    """Check 31."""
    inner = optax.adamw(1e-2)
    tx = master_weights(inner)
    rng = np.random.default_rng(1)
    params = jnp.asarray(rng.standard_normal(64), dtype)
    reference = params.astype(jnp.float32)
    state, inner_state = tx.init(params), inner.init(reference)
    step, plain_step = jax.jit(stepper(tx)), jax.jit(stepper(inner))

    for _ in range(200):
        grads = jnp.asarray(rng.standard_normal(64), jnp.float32)
        params, state = step(grads, state, params)
        reference, inner_state = plain_step(grads, inner_state, reference)

        assert_same_bits(params, state.master.astype(dtype))

    np.testing.assert_array_equal(state.master, reference)


@pytest.mark.parametrize("dtype", LOW)
def test_apply_updates_gives_what_sync_gives(dtype):
    """Check 32."""
    tx = master_weights(optax.sgd(1.0))
    params = jnp.asarray(normals(), dtype)
    state = tx.init(params)
    delta = np.random.default_rng(2).uniform(-1e-2, 1e-2, 2**20).astype(np.float32)

    for _ in range(3):
        updates, state = jax.jit(tx.update)(jnp.asarray(delta), state, params)
        params = optax.apply_updates(params, updates)

        assert updates.dtype == jnp.float32
        assert_same_bits(params, sync(params, state))


@pytest.mark.parametrize(("dtype", "binades"), [(jnp.float16, 12), (jnp.bfloat16, 15)])
def test_any_move_within_the_documented_factor_is_exact(dtype, binades):
    """Pairs of old and new values over the whole format; the new one is at most `binades` below the old one."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**16, (2, 2**18), dtype=np.uint16)
    old, new = (np.asarray(half).view(dtype) for half in bits)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(old) & np.isfinite(new)
    old, new = old[finite], new[finite]
    size = abs(old.astype(np.float64)), abs(new.astype(np.float64))
    change = abs(old.astype(np.float64) - new.astype(np.float64))
    usable = (size[1] > size[0] * 2.0**-binades) & (size[0] >= 2.0**-126) & (size[1] >= 2.0**-126)
    usable &= (change <= np.finfo(np.float32).max) & ((change == 0) | (change >= 2.0**-126))
    old, new = old[usable], new[usable]
    tx = master_weights(optax.scale(-1.0))
    params = jnp.asarray(old)
    state = tx.init(params)._replace(master=jnp.asarray(new, jnp.float32))

    updates, _ = tx.update(jnp.zeros_like(params), state, params)

    assert usable.sum() > 2**16
    assert_same_bits(optax.apply_updates(params, updates), new)


def test_a_larger_fall_is_off_by_little_and_made_up_for():
    """float32 cannot subtract its way from 60000 to 2**-20; one more step gets there."""
    tx = master_weights(optax.scale(-1.0))
    params = jnp.array([60000.0], jnp.float16)
    state = tx.init(params)._replace(master=jnp.array([2.0**-20]))

    updates, state = tx.update(jnp.zeros_like(params), state, params)
    once = optax.apply_updates(params, updates)
    updates, state = tx.update(jnp.zeros_like(params), state, once)
    twice = optax.apply_updates(once, updates)

    assert abs(float(once[0]) - 2.0**-20) < 60000 * 2.0**-24
    assert float(twice[0]) == 2.0**-20
    assert float(sync(params, state)[0]) == 2.0**-20


def test_a_master_above_float16_makes_the_parameter_infinite_and_stays():
    tx = master_weights(optax.sgd(1.0))
    params = jnp.array([64992.0], jnp.float16)
    state = tx.init(params)
    seen = []
    for grad in (-5000.0, -1.0, -1.0):
        updates, state = tx.update(jnp.array([grad]), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params[0]))

    assert seen == [np.inf] * 3
    assert float(state.master[0]) == 69994.0


@pytest.mark.parametrize("dtype", LOW)
def test_a_parameter_that_stays_keeps_its_bits(dtype):
    params = jnp.array([-0.0, 0.0, 1.5, -np.inf], dtype)
    tx = master_weights(optax.sgd(1.0))

    updates, _ = tx.update(jnp.zeros(4, dtype), tx.init(params), params)

    assert_same_bits(optax.apply_updates(params, updates), params)


def test_only_low_precision_floats_have_masters():
    params = {"half": jnp.ones(2, jnp.float16), "single": jnp.ones(2), "steps": jnp.arange(2), "none": None}
    tx = master_weights(optax.adam(1e-3))

    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params) | {"steps": np.zeros(2, jax.dtypes.float0)}
    updates, _ = tx.update(grads, state, params)

    assert state.master["half"].dtype == jnp.float32
    assert [state.master[k] for k in ("single", "steps")] == [optax.MaskedNode()] * 2
    assert updates["single"].dtype == jnp.float32
    np.testing.assert_allclose(updates["single"], -1e-3, rtol=1e-5)
    assert updates["steps"].dtype == jax.dtypes.float0


def test_inner_sees_float32_gradients_masters_and_extra_arguments():
    seen = {}

    def spy(updates, state, params=None, **extra_args):
        seen.update(grads=updates, params=params, extra=extra_args)
        return updates, state

    tx = master_weights(optax.GradientTransformationExtraArgs(lambda p: p, spy))
    params = jnp.full(2, 0.1, jnp.bfloat16)

    tx.update(jnp.ones(2, jnp.bfloat16), tx.init(params), params=params, value=3)

    assert seen["grads"].dtype == jnp.float32
    assert seen["params"].dtype == jnp.float32
    assert seen["extra"] == {"value": 3}


def test_param_dtype_keeps_the_full_precision_initialisation():
    original = {"w": jnp.asarray(normals(64)), "n": jnp.arange(2)}
    tx = master_weights(optax.sgd(1.0), param_dtype=jnp.float16)

    state = tx.init(original)
    stored = {"w": original["w"].astype(jnp.float16), "n": original["n"]}
    grads = {"w": jnp.zeros(64, jnp.float16), "n": np.zeros(2, jax.dtypes.float0)}
    updates, state = tx.update(grads, state, stored)

    assert_same_bits(state.master["w"], original["w"])
    assert_same_bits(stored["w"] + updates["w"].astype(jnp.float16), stored["w"])


def test_param_dtype_float32_makes_no_masters():
    state = master_weights(optax.sgd(1.0), param_dtype="float32").init({"w": jnp.ones(2)})

    assert jax.tree.leaves(state.master) == []


def test_parameters_that_were_not_cast_are_refused():
    tx = master_weights(optax.sgd(1.0), param_dtype=jnp.float16)
    params = {"dense": {"kernel": jnp.ones(2)}}

    with pytest.raises(TypeError, match=r"'dense/kernel' is float32.*Cast the parameters after init"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="floating dtype, got int8"):
        master_weights(optax.sgd(1.0), param_dtype="int8")


def test_masters_survive_donation_of_the_parameters():
    tx = master_weights(optax.sgd(1.0), param_dtype=jnp.float16)
    params = jnp.ones(4)

    state = tx.init(params)
    params.delete()

    np.testing.assert_array_equal(state.master, np.ones(4))


def test_hyperparameters_inside_stay_float32():
    """Check 36. Stock inject_hyperparams casts to the parameters' dtype: b2 = 0.999 becomes 1, the update NaN."""
    params = jnp.ones(3, jnp.bfloat16)
    tx = master_weights(optax.inject_hyperparams(optax.adamw)(1e-3, weight_decay=0.0))

    updates, state = tx.update(jnp.ones(3, jnp.bfloat16), tx.init(params), params)
    moved = state.master - 1

    assert float(state.inner.hyperparams["b2"]) == np.float32(0.999)
    np.testing.assert_allclose(moved, -1e-3, atol=1e-6)
    assert bool(jnp.isfinite(updates).all())


WRAPS = {
    "full": master_weights,
    "split": lambda inner: master_weights(inner, store="split"),
    "stochastic": lambda inner: stochastic_rounding(inner, jax.random.key(0)),
    "kahan": kahan,
    "nearest": nearest_rounding,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_norms_and_clipping_are_float32(wrap):
    """Check 43. Four float16 gradients of 300 have the norm 600; stock optax makes it infinite and clips to zeros."""
    dtype = jnp.bfloat16 if wrap is WRAPS["split"] else jnp.float16
    params, grads = jnp.zeros(4, dtype), jnp.full(4, 300, dtype)
    seen = []

    def spy(updates, state, params=None):
        seen.append(optax.tree.norm(updates))
        return updates, state

    norm = optax.GradientTransformation(lambda p: (), spy)
    tx = wrap(optax.chain(norm, optax.clip_by_global_norm(1.0), norm))
    stock, _ = optax.clip_by_global_norm(1.0).update(jnp.full(4, 300, jnp.float16), optax.EmptyState())

    updates, _ = tx.update(grads, tx.init(params), params)

    assert seen[0].dtype == jnp.float32
    assert float(seen[0]) == 600.0
    assert float(seen[1]) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(updates, 0.5, atol=1e-6)
    np.testing.assert_array_equal(stock, 0.0)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_second_moments_are_float32(wrap):
    """Check 37. After 2000 steps of gradient 1, nu is 1 - 0.999**2000; in bfloat16 it stalls at 0.5."""
    tx = wrap(optax.scale_by_adam())
    params = jnp.ones((), jnp.bfloat16)
    state = tx.init(params)
    grad = jnp.ones((), jnp.bfloat16)

    def step(state, _):
        _, state = tx.update(grad, state, params)
        return state, None

    final, _ = jax.lax.scan(step, state, None, length=2000)

    assert float(optax.tree_utils.tree_get(final, "nu")) == pytest.approx(1 - 0.999**2000, abs=1e-3)


def test_adam_on_float16_is_finite_where_stock_adam_is_not():
    params = jnp.ones(3, jnp.float16)
    grads = jnp.array([0.0, 1e-4, 1e-2], jnp.float16)

    stock, _ = optax.adam(1e-3).update(grads, optax.adam(1e-3).init(params), params)
    tx = nearest_rounding(optax.adam(1e-3))
    ours, _ = tx.update(grads, tx.init(params), params)

    assert not bool(jnp.isfinite(stock).all())
    np.testing.assert_allclose(ours, [0.0, -1e-3, -1e-3], rtol=1e-3)


def test_whole_stack_in_a_scan_with_a_skip():
    """Check 38."""
    tx = loss_scaling(master_weights(optax.adamw(1e-3)), DynamicLossScale(init=4.0))
    params = {"w": jnp.ones(8, jnp.bfloat16), "b": jnp.zeros(2, jnp.float16)}
    state = tx.init(params)

    def step(carry, grad):
        params, state = carry
        updates, new = tx.update(jax.tree.map(lambda p: jnp.full_like(p, grad), params), state, params)
        return (optax.apply_updates(params, updates), new), step_was_applied(new)

    (params, final), applied = jax.lax.scan(step, (params, state), jnp.array([1.0, jnp.inf, 1.0, 1.0, 1.0]))

    assert applied.tolist() == [True, False, True, True, True]
    assert [x.dtype for x in jax.tree.leaves(final)] == [x.dtype for x in jax.tree.leaves(state)]
    assert int(optax.tree_utils.tree_get(final, "count")) == 4
    for name, p in params.items():
        assert_same_bits(p, sync(params, final)[name])


def test_it_trains_a_low_precision_nnx_model():
    """Check 41."""
    model = nnx.Linear(2, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, loss_scaling(master_weights(optax.sgd(1e-4)), DynamicLossScale(1.0)), wrt=nnx.Param
    )
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))

    for _ in range(100):
        optimizer.update(model, grads)

    assert float(optimizer.opt_state.inner.master["bias"][0]) == pytest.approx(-0.01, abs=1e-7)
    assert float(model.bias[0]) == -0.010009765625
    assert (int(skipped_steps(optimizer.opt_state)), int(optimizer.opt_state.total)) == (0, 100)
