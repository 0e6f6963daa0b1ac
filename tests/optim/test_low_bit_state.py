"""Optimizer moments in few bits: what is stored, what is left alone, and what a step becomes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from precision_lab import formats
from precision_lab.formats.memory import storage
from precision_lab.optim import (
    DynamicLossScale,
    LowBitMoment,
    kahan,
    loss_scaling,
    low_bit_state,
    master_weights,
    second_moments,
    stochastic_rounding,
    zero_second_moment_fraction,
)
from precision_lab.quant import fake_quantize

SHAPE = (48, 100)  # 4800 values: no multiple of a group
PARAMS = {"kernel": jnp.ones(SHAPE), "bias": jnp.ones(SHAPE[1])}


def gradients(seed, scale=1.0):
    """Gradients over eight decades, as moments are."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * rng.standard_normal(p.shape) * 10.0 ** rng.uniform(-8, 0, p.shape), jnp.float32)
        for name, p in PARAMS.items()
    }


def moments(state):
    return [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, LowBitMoment)) if is_low(x)]


def is_low(x):
    return isinstance(x, LowBitMoment)


def steps(tx, count, params=PARAMS, state=None, first=0):
    state = tx.init(params) if state is None else state
    for step in range(first, first + count):
        updates, state = jax.jit(tx.update)(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def flat_rounded(x, qz):
    return np.asarray(fake_quantize(jnp.asarray(x, jnp.float32).reshape(-1), qz, axis=0)).reshape(np.shape(x))


@pytest.mark.parametrize(
    ("spec", "of_squares"),
    [
        ("dynamic8@group256", "dynamic8_unsigned@group256"),
        ("dynamic8@tensor", "dynamic8_unsigned@tensor"),
        ("int8@tensor", "uint8@tensor"),
        ("float8_e4m3fn@group128", "float8_e4m3fn@group128"),
        ("mxfp8", "mxfp8"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_two_steps_are_adams_between_roundings_written_out(spec, of_squares):
    """Kernels have moments on the grid of flat runs; biases, being few, are plain Adam's."""
    b1, b2, eps, lr = 0.5, 0.75, 1e-8, 1e-2  # with exact powers, which Optax takes in float32
    m = {name: np.zeros(p.shape, np.float32) for name, p in PARAMS.items()}
    v, expected = dict(m), dict(PARAMS)
    for t in (1, 2):
        g = gradients(t - 1)
        for name in PARAMS:
            m[name] = np.float32(b1) * m[name] + np.float32(1 - b1) * np.asarray(g[name])
            v[name] = np.float32(b2) * v[name] + np.float32(1 - b2) * np.asarray(g[name]) ** 2
            step = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            expected[name] = expected[name] - lr * step
        m["kernel"], v["kernel"] = flat_rounded(m["kernel"], spec), flat_rounded(v["kernel"], of_squares)

    params, state = steps(low_bit_state(optax.adam(lr, b1, b2, eps), spec), 2)

    np.testing.assert_allclose(params["bias"], expected["bias"], rtol=2e-6)
    # A last bit of a moment, fused differently, may fall to the other side of a midpoint: the next code.
    close = np.isclose(params["kernel"], expected["kernel"], rtol=2e-6)
    assert close.mean() > 0.999
    assert [one.shape for one in moments(state)] == [SHAPE, SHAPE]
    (second,) = (x for x in second_moments(state) if x.shape == SHAPE)
    assert (np.asarray(second) == v["kernel"]).mean() > 0.99


def test_float32_state_is_that_of_plain_adam_bit_for_bit():
    plain, plain_state = steps(optax.adam(1e-2), 3)

    params, state = steps(low_bit_state(optax.adam(1e-2), "float32"), 3)

    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(state.inner[0].nu["kernel"].dequantize(), plain_state[0].nu["kernel"])


def test_bytes_are_those_of_the_accounting_and_small_arrays_stay():
    state = low_bit_state(optax.adam(1e-2), "dynamic8@group256").init(PARAMS)

    assert [one.nbytes for one in moments(state)] == [storage(4800, "dynamic8", group=256).total_bytes] * 2
    assert state.inner[0].mu["bias"].dtype == jnp.float32
    assert state.inner[0].count.dtype == jnp.int32
    everything = low_bit_state(optax.adam(1e-2), "int8@tensor", min_size=1).init(PARAMS)
    assert len(moments(everything)) == 4


def test_hyperparameters_stay_as_they_are_whatever_their_size():
    """In bfloat16, b2 = 0.999 would be 1, and no second moment would ever move."""
    tx = low_bit_state(optax.inject_hyperparams(optax.adam)(1e-2), "bfloat16", min_size=1)

    params, state = steps(tx, 2)

    assert len(moments(state)) == 4
    assert float(state.inner.hyperparams["b2"]) == np.float32(0.999)
    plain, _ = steps(low_bit_state(optax.adam(1e-2), "bfloat16", min_size=1), 2)
    np.testing.assert_allclose(params["bias"], plain["bias"], rtol=1e-5)


@pytest.mark.parametrize(
    ("inner", "signed", "never_negative"),
    [
        (optax.amsgrad(1e-2), ["mu"], ["nu", "nu_max"]),
        (optax.adagrad(1e-2), [], ["sum_of_squares"]),
        (optax.lion(1e-2), ["mu"], []),
        (optax.sgd(1e-2, momentum=0.9), ["trace"], []),
    ],
    ids=["amsgrad", "adagrad", "lion", "momentum"],
)
def test_what_is_never_negative_in_a_state_of_optax_has_no_sign(inner, signed, never_negative):
    (state,) = [one for one in low_bit_state(inner, "int8@tensor").init(PARAMS).inner if moments(one)]

    found = {name: getattr(state, name)["kernel"].stored.quantizer.format.name for name in state._fields
             if name not in ("count", "seed")}  # fmt: skip

    assert found == {**dict.fromkeys(signed, "int8"), **dict.fromkeys(never_negative, "uint8")}


def test_min_size_is_the_smallest_array_that_is_quantized():
    size = PARAMS["kernel"].size

    assert len(moments(low_bit_state(optax.adam(1e-2), "int8", min_size=size).init(PARAMS))) == 2
    with pytest.raises(ValueError, match=f"no floating array of {size + 1} values"):
        low_bit_state(optax.adam(1e-2), "int8", min_size=size + 1).init(PARAMS)


class Named(NamedTuple):
    """Parameters, one of which has the name of optax's second moments."""

    nu: jax.Array
    other: jax.Array


def test_a_parameter_called_nu_has_first_moments_of_both_signs():
    """Stored without negative numbers, they were zero."""
    params = Named(jnp.ones(SHAPE), jnp.ones(SHAPE))
    tx = low_bit_state(optax.adam(1e-2), "dynamic8@group256")

    _, state = jax.jit(tx.update)(jax.tree.map(lambda p: -p, params), tx.init(params), params)

    adam = state.inner[0]
    formats_of = [[one.stored.quantizer.format.name for one in moment] for moment in (adam.mu, adam.nu)]
    assert formats_of == [["dynamic8"] * 2, ["dynamic8_unsigned"] * 2]
    np.testing.assert_array_equal(adam.mu.nu.dequantize(), adam.mu.other.dequantize())
    assert (adam.mu.nu.dequantize() < 0).all()


def test_squares_that_a_linear_code_loses_are_kept_by_the_dynamic_one():
    """Below half a step of the largest value a linear code has nothing; the dynamic one reaches seven decades down."""
    squares = np.asarray(gradients(0)["kernel"], np.float64) ** 2 * (1 - 0.999)

    def zeros(spec):
        tx = low_bit_state(optax.adam(1e-2), spec)
        state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)[1]
        return float(zero_second_moment_fraction(state)) * (SHAPE[0] + 1) / SHAPE[0]

    linear = np.mean(squares < squares.max() / 510)
    smallest = float(formats.format("dynamic8_unsigned").grid()[1])
    dynamic = np.mean(squares < squares.max() * smallest / 2)
    assert zeros("int8@tensor") == pytest.approx(linear, abs=1e-3)
    assert zeros("dynamic8@tensor") == pytest.approx(dynamic, abs=1e-3)
    assert linear > dynamic + 0.2
    with pytest.raises(ValueError, match="no second moments"):
        zero_second_moment_fraction(optax.sgd(1.0, momentum=0.9).init(PARAMS))


def test_stochastic_rounding_draws_differently_for_different_values():
    tx = low_bit_state(optax.sgd(1.0, momentum=0.5), "int4@tensor,stochastic")

    _, state = steps(tx, 1)
    _, again = steps(tx, 1)

    trace = np.asarray(state.inner[0].trace["kernel"].dequantize())
    exact = np.asarray(gradients(0)["kernel"])
    np.testing.assert_array_equal(trace, again.inner[0].trace["kernel"].dequantize())
    assert (abs(trace - exact) < abs(exact).max() / 7 * 1.001).all()
    nearest = flat_rounded(exact, "int4@tensor")
    assert (trace != nearest).mean() > 0.02
    assert abs((trace - exact).mean()) < 4 * (trace - exact).std() / np.sqrt(exact.size)


def test_a_state_survives_a_checkpoint_and_goes_on_alike(tmp_path):
    tx = low_bit_state(optax.adam(1e-2), "dynamic8@group256")
    params, state = steps(tx, 2)
    whole, _ = steps(tx, 2, params, state, first=2)

    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))

    assert moments(restored)[0].stored.quantizer == moments(state)[0].stored.quantizer
    again, _ = steps(tx, 2, params, restored, first=2)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("around", ["master", "kahan", "stochastic", "chain", "multi"])
def test_it_goes_inside_what_rounds_parameters_and_inside_optax(around):
    low = low_bit_state(optax.adam(1e-2), "dynamic8@group256")
    tx = {
        "master": lambda: loss_scaling(master_weights(low), DynamicLossScale(4.0)),
        "kahan": lambda: kahan(low),
        "stochastic": lambda: stochastic_rounding(low, jax.random.key(0)),
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), low),
        "multi": lambda: optax.MultiSteps(low, 2).gradient_transformation(),
    }[around]()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS) if around in ("master", "kahan") else PARAMS

    def step(carry, seed):
        p, state = carry
        updates, state = tx.update(jax.tree.map(lambda x: x.astype(jnp.float32) * seed, params), state, p)
        return (optax.apply_updates(p, updates), state), None

    (after, state), _ = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(1.0, 5.0)))()

    assert len(moments(state)) == 2
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(after))
    assert (np.asarray(after["kernel"], np.float32) < 1).all()


@pytest.mark.parametrize(
    ("inner", "name"),
    [
        (master_weights(optax.adam(1e-3)), "MasterWeights"),
        (kahan(optax.adam(1e-3)), "Kahan"),
        (optax.MultiSteps(optax.adam(1e-3), 2), "MultiSteps"),
        (low_bit_state(optax.adam(1e-3), "int8"), "LowBit"),
    ],
    ids=["master", "kahan", "multi", "itself"],
)
def test_what_belongs_around_it_is_refused_inside(inner, name):
    with pytest.raises(ValueError, match=f"stands around {name}, .* Put it inside"):
        low_bit_state(inner, "dynamic8@group256").init(PARAMS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int8@channel", "has scales by channel, but moments enter no product.*int8@group256"),
        ("float8_e4m3fn@block128x128", "has scales by block"),
        ("uint8@tensor", "holds no negative values"),
        ("dynamic8_unsigned@group256", "holds no negative values"),
        ("int8@tensor,pact", "estimates a gradient"),
    ],
)
def test_a_quantizer_that_cannot_store_moments_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        low_bit_state(optax.adam(1e-3), spec)


def test_an_optimizer_without_large_moments_is_refused():
    for tx, params in ((optax.sgd(1.0), PARAMS), (optax.adam(1.0), {"bias": PARAMS["bias"]})):
        with pytest.raises(ValueError, match=r"would change nothing.*4096 values"):
            low_bit_state(tx, "int8").init(params)


def test_a_scheme_that_second_moments_cannot_have_is_refused_in_the_words_of_the_caller():
    assert low_bit_state(optax.sgd(1.0, momentum=0.9), "int8@tensor,full").init(PARAMS)

    with pytest.raises(ValueError, match=r"int8,full would store second moments.* as uint8.* Leave the scheme out"):
        low_bit_state(optax.adam(1e-3), "int8@tensor,full").init(PARAMS)
