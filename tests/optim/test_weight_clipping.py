"""Weight clipping: inside means inside, bit for bit, whatever the dtype, the program and what is around it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from precision_lab.optim import (
    apply_updates,
    glorot_scaling,
    kahan,
    loss_scaling,
    master_weights,
    nearest_rounding,
    stochastic_rounding,
    weight_clipping,
)

RNG = np.random.default_rng(5)
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def many(dtype, size=1 << 16):
    """Returns parameters and updates of all sizes, many of them near the ends of [-1, 1]."""
    p = RNG.uniform(-1, 1, size) * 2.0 ** RNG.integers(-30, 1, size)
    p[::2] = np.sign(p[::2]) * (1 - np.abs(p[::2]) * 2.0**-12)
    u = RNG.normal(size=size) * 2.0 ** RNG.integers(-26, 3, size)
    return p.astype(dtype), u.astype(np.float32)


def once(tx, p, u, apply=optax.apply_updates):
    """Returns the parameter after one update, all in one program, which may fuse what it likes."""

    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return apply(params, updates)

    return np.asarray(jax.jit(step)({"kernel": jnp.asarray(p)}, {"kernel": jnp.asarray(u)})["kernel"])


@pytest.mark.parametrize("apply", [optax.apply_updates, apply_updates], ids=["optax", "ours"])
@pytest.mark.parametrize("bound", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_40_real_weights_stay_inside(dtype, bound, apply):
    """The bound itself in float64, and in the dtype the largest number up to it."""
    p, u = many(dtype)
    p = (p * dtype(bound)).astype(dtype)
    p[np.abs(p.astype(np.float64)) > bound] = 0

    after = once(optax.chain(optax.scale(0.37), weight_clipping(bound)), p, u, apply).astype(np.float64)
    # Step by step: in one program XLA fuses the product into the sum, where nothing is clipped.
    free = (p.astype(np.float32) + np.float32(0.37) * u).astype(dtype).astype(np.float64)

    assert np.abs(after).max() <= bound
    assert np.mean(np.abs(free) > bound) > 0.05
    # At the end or next to it: the way back is rounded once, and once more to stay inside.
    beyond = np.abs(free) > bound
    assert np.all(np.sign(after[beyond]) == np.sign(free[beyond]))
    assert np.abs(after[beyond]).min() >= bound * (1 - 2 * float(ml_dtypes.finfo(dtype).eps))
    np.testing.assert_array_equal(after[~beyond], free[~beyond])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_parameter_from_far_outside_comes_inside_at_once(dtype):
    """Where no float32 number brings it to the end itself, an end would be passed by rounding."""
    p = (RNG.uniform(1, 2, 4096) * 2.0 ** RNG.integers(0, 15, 4096) * RNG.choice([-1, 1], 4096)).astype(dtype)
    p = p if dtype == np.float16 else (p.astype(np.float32) * np.float32(2**15)).astype(dtype)

    after = once(weight_clipping(), p, np.zeros(4096, np.float32)).astype(np.float64)

    assert np.abs(after).max() <= 1


def test_nan_is_not_hidden_and_infinity_is_clipped():
    after = once(weight_clipping(), np.float32([0.5, 0.5, 0.5]), np.float32([np.nan, np.inf, -np.inf]))

    assert np.isnan(after[0])
    assert after[1:].tolist() == [1, -1]


WRAPPED = {
    "masters": lambda inner: master_weights(inner),
    "split": lambda inner: master_weights(inner, store="split"),
    "stochastic": lambda inner: stochastic_rounding(inner, jax.random.key(0)),
    "nearest": nearest_rounding,
    "scaled masters": lambda inner: loss_scaling(master_weights(inner)),
    "accumulated": lambda inner: optax.MultiSteps(inner, 2),
    "hyperparameters": lambda inner: optax.chain(optax.clip_by_global_norm(1e6), inner),
}


@pytest.mark.parametrize("around", WRAPPED)
def test_it_composes_and_weights_stay_inside_for_a_hundred_steps(around):
    dtype = jnp.float32 if around in ("accumulated", "hyperparameters") else jnp.bfloat16
    params = {"a": {"kernel": jnp.asarray(RNG.uniform(-1, 1, (8, 8)), dtype), "bias": jnp.zeros(8, dtype)}}
    tx = WRAPPED[around](optax.chain(optax.sgd(0.3, momentum=0.9), weight_clipping()))
    state = tx.init(params)
    scale = state.loss_scale if around == "scaled masters" else 1

    def step(carry, key):
        params, state = carry
        grads = jax.tree.map(lambda p: scale * (0.2 + jax.random.normal(key, p.shape)), params)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.max(jnp.abs(params["a"]["kernel"]))

    (params, _), largest = jax.lax.scan(step, (params, state), jax.random.split(jax.random.key(1), 100))

    assert float(largest.max()) <= 1
    assert float(largest[-1]) >= 0.99
    assert float(jnp.max(jnp.abs(params["a"]["bias"]))) > 1.5


def test_kahan_may_pass_the_end_by_an_ulp_and_by_no_more():
    params = {"kernel": jnp.asarray(RNG.uniform(-1, 1, 512), jnp.bfloat16)}
    tx = kahan(optax.chain(optax.sgd(0.1), weight_clipping()))
    state = tx.init(params)

    for key in jax.random.split(jax.random.key(0), 30):
        updates, state = tx.update({"kernel": jax.random.normal(key, (512,), jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
        assert float(jnp.max(jnp.abs(params["kernel"]))) <= 1 + 2**-7


def test_only_the_chosen_weights_of_an_nnx_model_are_clipped():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    params = nnx.state(model, nnx.Param)
    tx = optax.chain(optax.scale(1.0), weight_clipping(paths="layers/1/kernel"))

    updates, _ = tx.update(jax.tree.map(lambda p: jnp.full_like(p, 9), params), tx.init(params), params)
    after = optax.apply_updates(params, updates)

    assert float(after["layers"][0]["kernel"][...].min()) > 1
    assert float(after["layers"][1]["kernel"][...].max()) <= 1
    assert float(after["layers"][1]["bias"][...].max()) == 9


def test_it_works_under_masked_and_multi_transform_and_with_none():
    params = {"kernel": jnp.zeros(3), "other": {"kernel": jnp.zeros(3)}, "none": None, "n": jnp.arange(2)}
    grads = {"kernel": jnp.full(3, 5.0), "other": {"kernel": jnp.full(3, 5.0)}, "none": None, "n": jnp.zeros(2)}
    masked = optax.masked(weight_clipping(), {"kernel": True, "other": False, "none": True, "n": False})
    labels = {"kernel": "clip", "other": {"kernel": "free"}, "none": None, "n": "free"}
    several = optax.multi_transform({"clip": weight_clipping(), "free": optax.identity()}, labels)

    for tx in (masked, several):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert updates["kernel"].tolist() == [1, 1, 1]
        assert updates["other"]["kernel"].tolist() == [5, 5, 5]


@pytest.mark.parametrize(("shape", "fans"), [((20, 30), 50), ((3, 3, 4, 8), 9 * 12)])
def test_glorot_scaling_divides_by_the_coefficient(shape, fans):
    """sqrt(1.5 / (fan_in + fan_out)), and its square for SGD."""
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}
    grads = jax.tree.map(jnp.ones_like, params)

    adam, sgd = (glorot_scaling(power=power).update(grads, optax.EmptyState(), params)[0] for power in (1, 2))

    np.testing.assert_allclose(adam["kernel"], 1 / np.sqrt(1.5 / fans), rtol=1e-6)
    np.testing.assert_allclose(sgd["kernel"], fans / 1.5, rtol=1e-6)
    assert adam["bias"].tolist() == [1] * shape[-1]


def test_it_works_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for dtype in (jnp.float32, jnp.bfloat16):
            params = {"kernel": jnp.ones((2, 2), dtype)}
            tx = optax.chain(glorot_scaling(), weight_clipping(0.5))

            updates, _ = jax.jit(tx.update)({"kernel": jnp.ones((2, 2), dtype)}, tx.init(params), params)

            assert updates["kernel"].dtype == jnp.float32
            assert updates["kernel"].tolist() == [[-0.5] * 2] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: weight_clipping(0.0), "positive, finite bound, got 0.0"),
        (lambda p: glorot_scaling(power=3), "power 1, for Adam, or 2, for SGD; got 3"),
        (
            lambda p: weight_clipping(paths=("a/kernel", "b/kernl")).init(p),
            "'b/kernl' matches no parameter. Nearest: 'a/kernel'",
        ),
        (lambda p: weight_clipping().update(p, optax.EmptyState()), "weight_clipping needs the parameters"),
        (lambda p: glorot_scaling(paths="b/bias").init(p), r"kernels \(..., in, out\), but 'b/bias' is \(2,\)"),
    ],
)
def test_what_cannot_be_honoured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call({"a": {"kernel": jnp.ones((2, 2))}, "b": {"bias": jnp.ones(2)}})


def test_complex_weights_are_refused():
    with pytest.raises(TypeError, match="real numbers in an interval, got complex64"):
        weight_clipping().init({"kernel": jnp.ones(2, jnp.complex64)})
