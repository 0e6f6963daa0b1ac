"""In-place rounding: stochastic is right on average, kahan remembers what it lost."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from precision_lab.optim import (
    DynamicLossScale,
    kahan,
    loss_scaling,
    master_weights,
    nearest_rounding,
    stochastic_rounding,
)

LOW = [jnp.bfloat16, jnp.float16]
KEY = jax.random.key(0)


def train(tx, params, grad, steps):
    """Returns (params, state) after `steps` updates with a constant gradient."""

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.full(p.shape, grad, jnp.float32), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[0])((params, tx.init(params)))


def once(tx, params, step):
    """Returns the parameters after one step of `step`."""
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.asarray, step), tx.init(params), params)
    return optax.apply_updates(params, updates)


def as_bits(x):
    return np.asarray(x).view(np.uint16)


def test_check_34_one_step_is_unbiased():
    """1 + 2**-9 is a quarter of an ulp above 1; four standard errors of the share are 0.0017."""
    ones = jnp.ones(2**20, jnp.bfloat16)

    rounded = once(stochastic_rounding(optax.scale(1.0), KEY), ones, np.full(2**20, 2.0**-9, np.float32))
    up = np.asarray(rounded, np.float64) > 1

    assert set(np.unique(np.asarray(rounded, np.float64))) == {1.0, 1 + 2.0**-7}
    assert up.mean() == pytest.approx(0.25, abs=0.003)
    assert np.asarray(rounded, np.float64).mean() == pytest.approx(1 + 2.0**-9, abs=2e-5)


@pytest.mark.parametrize("dtype", LOW)
def test_check_34_small_steps_have_their_effect(dtype):
    """The standard error of the mean is 2**-7 * sqrt(.128 * .872) * sqrt(1000 / 4096) = .0013 in bfloat16."""
    weights = jnp.ones(4096, dtype)

    after, _ = train(stochastic_rounding(optax.sgd(1e-3), KEY), weights, -1.0, 1000)
    nearest, _ = train(nearest_rounding(optax.sgd(1e-3 if dtype == jnp.bfloat16 else 1e-4)), weights, -1.0, 1000)

    assert np.asarray(after, np.float64).mean() == pytest.approx(2.0, abs=0.005)
    assert set(np.asarray(nearest, np.float64)) == {1.0}


@pytest.mark.parametrize("dtype", LOW)
def test_check_34_exact_sums_are_exact(dtype):
    p = jnp.asarray(np.random.default_rng(0).standard_normal(2**12), dtype)
    p = p.at[:3].set(jnp.asarray([np.inf, -0.0, 0.0], dtype))

    after = once(stochastic_rounding(optax.scale(1.0), KEY), p, np.zeros(2**12, np.float32))
    doubled = once(stochastic_rounding(optax.scale(1.0), KEY), p, np.asarray(p, np.float32))

    np.testing.assert_array_equal(as_bits(after), as_bits(p))
    np.testing.assert_array_equal(np.asarray(doubled, np.float64), 2 * np.asarray(p, np.float64))


def test_check_34_equal_keys_give_equal_bits_and_others_do_not():
    weights = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}

    def trained(key):
        return train(stochastic_rounding(optax.sgd(1e-3), key), weights, -1.0, 3)[0]

    first, again, other = trained(KEY), trained(jax.random.key(0)), trained(jax.random.key(1))
    raw = trained(jax.random.PRNGKey(0))

    np.testing.assert_array_equal(as_bits(first["a"]), as_bits(again["a"]))
    np.testing.assert_array_equal(as_bits(first["a"]), as_bits(raw["a"]))
    assert (as_bits(first["a"]) != as_bits(other["a"])).any()
    assert (as_bits(first["a"]) != as_bits(first["b"])).any()


def test_steps_draw_anew_and_a_skipped_step_does_not():
    tx = loss_scaling(stochastic_rounding(optax.scale(1.0), KEY))
    p = jnp.ones(4096, jnp.bfloat16)
    state = tx.init(p)
    step = jnp.full(4096, 2.0**-9) * state.loss_scale

    first, applied = tx.update(step, state, p)
    second, _ = tx.update(step, applied, p)
    _, skipped = tx.update(step.at[0].set(jnp.inf), state, p)
    retried, _ = tx.update(step * 0.5, skipped, p)

    assert (np.asarray(first) != np.asarray(second)).any()
    np.testing.assert_array_equal(np.asarray(first), np.asarray(retried))


def test_a_key_is_required():
    with pytest.raises(TypeError, match=r"one JAX key, such as jax.random.key\(0\), got 0"):
        stochastic_rounding(optax.sgd(1.0), 0)
    with pytest.raises(TypeError, match="one JAX key"):
        stochastic_rounding(optax.sgd(1.0), jax.random.split(KEY, 3))


def test_check_35_kahan_reaches_what_bfloat16_cannot():
    one = jnp.ones((), jnp.bfloat16)
    rate = float(jnp.bfloat16(1e-3))

    after, state = train(kahan(optax.sgd(rate)), one, -1.0, 1000)
    without, _ = train(nearest_rounding(optax.sgd(rate)), one, -1.0, 1000)

    assert float(after) == 2.0
    assert float(after) + float(state.compensation) == pytest.approx(1 + 1000 * rate, abs=2.0**-8)
    assert state.compensation.dtype == jnp.bfloat16
    assert float(without) == 1.0


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_kahan_is_the_published_recursion(dtype):
    """Against NumPy, which rounds after every operation: c = c + u; new = p + c; c = c + (p - new)."""
    rng = np.random.default_rng(4)
    p = rng.standard_normal(512).astype(dtype)
    c = np.zeros(512, dtype)
    tx = kahan(optax.scale(1.0))
    params, state = jnp.asarray(p), tx.init(jnp.asarray(p))
    update = jax.jit(tx.update)

    for _ in range(30):
        u = (rng.standard_normal(512) * 2.0 ** rng.integers(-12, 1, 512)).astype(np.float32)
        updates, state = update(jnp.asarray(u), state, params)
        params = optax.apply_updates(params, updates)
        c = (c.astype(np.float32) + u).astype(dtype)
        new = p + c
        c, p = c + (p - new), new

        np.testing.assert_array_equal(as_bits(params), as_bits(p))
        np.testing.assert_array_equal(np.asarray(state.compensation, np.float32), c.astype(np.float32))


@pytest.mark.parametrize("wrap", [kahan, lambda inner: stochastic_rounding(inner, KEY)], ids=["kahan", "stochastic"])
def test_other_leaves_are_updated_or_left_alone(wrap):
    params = {"w": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2), "n": jnp.arange(2), "none": None}
    grads = {"w": jnp.ones(2), "single": jnp.ones(2), "n": np.zeros(2, jax.dtypes.float0), "none": None}
    tx = wrap(optax.adam(0.5))

    state = tx.init(params)
    updates, after = tx.update(grads, state, params)

    assert updates["n"] is grads["n"]
    np.testing.assert_allclose(updates["single"], -0.5, rtol=1e-5)
    assert updates["w"].dtype == jnp.float32
    assert float((params["w"] + updates["w"])[0]) == pytest.approx(0.5, abs=2.0**-9)
    assert jax.tree.map(jnp.dtype, state.inner[0].mu["w"].dtype) == jnp.float32
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, state)


@pytest.mark.parametrize("store", ["kahan", "stochastic", "split"])
def test_works_under_strict_promotion(store):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        inner = optax.sgd(jnp.float32(0.5))
        wraps = {"kahan": kahan, "stochastic": lambda i: stochastic_rounding(i, KEY)}
        wrapped = wraps[store](inner) if store in wraps else master_weights(inner, store=store)
        tx = loss_scaling(wrapped, DynamicLossScale(init=2.0, hysteresis=2))
        params = {"w": jnp.ones(3, jnp.bfloat16)}

        updates, state = jax.jit(tx.update)({"w": jnp.ones(3, jnp.bfloat16)}, tx.init(params), params)

    assert updates["w"].tolist() == [-0.25] * 3
    assert updates["w"].dtype == jnp.float32
    assert not any(getattr(x, "weak_type", False) for x in jax.tree.leaves(state))
