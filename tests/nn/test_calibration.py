"""Static scales: found in floating formats, one for each tensor, and what converted models use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab import models
from precision_lab.models import DataSpec
from precision_lab.models.config import MLPConfig, TransformerConfig


def product(params, x):
    return x @ params["w"]


PARAMS = {"w": jnp.asarray([[1.0, 2.0], [3.0, -4.0]])}


def test_scales_are_those_of_the_largest_magnitude_over_all_batches():
    batches = [jnp.asarray([[1.0, -2.0]]), jnp.asarray([[0.5, 12.7]]), jnp.asarray([[-3.0, 1.0]])]

    calibrated = pl.calibrate(product, "weight=int8@channel,activation=int8@tensor", batches, PARAMS)

    assert calibrated.scales["w"]["lhs"]["scale"] == np.float32(12.7) / np.float32(127)
    assert tuple(map(float, calibrated.ranges["w", "lhs"])) == (-3.0, np.float32(12.7))


def test_keyword_batches_are_each_their_own_and_keep_what_is_no_array():
    """A function's second batch was run as its first again, and a Linen model's flag became a traced array."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train=True):
            assert not train
            return linen.Dense(2)(x)

    batches = [{"x": jnp.full((1, 2), value)} for value in (1.0, 5.0)]
    variables = {"params": {"Dense_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}}

    of_function = pl.calibrate(product, "w8a8", batches, PARAMS)
    of_model = pl.calibrate(Net(), "w8a8", [{**batch, "train": False} for batch in batches], variables)

    assert [float(high) for found in (of_function, of_model) for _, high in found.ranges.values()] == [5, 5]


def test_a_running_average_moves_once_a_batch():
    batches = [jnp.full((1, 2), value) for value in (1.0, 2.0, 4.0)]

    calibrated = pl.calibrate(product, "weight=int8@channel,activation=int8@tensor,ema", batches, PARAMS, momentum=0.5)

    assert float(calibrated.ranges["w", "lhs"][1]) == ((1 + 2) / 2 + 4) / 2


def test_an_affine_scale_comes_with_its_zero_point():
    batch = jnp.asarray([[0.0, 25.5]])

    calibrated = pl.calibrate(product, "weight=int8@channel,activation=int8@tensor,affine", [batch], PARAMS)

    found = calibrated.scales["w"]["lhs"]
    np.testing.assert_allclose(found["scale"], 0.1, rtol=1e-6)
    assert float(found["zero_point"]) == -128
    expected = pl.fake_quantize(batch, "int8,affine", **found) @ pl.fake_quantize(PARAMS["w"], "int8@channel", axis=0)
    np.testing.assert_allclose(calibrated(batch), expected, rtol=1e-6)


def test_values_beyond_the_range_saturate():
    calibrated = pl.calibrate(product, "weight=int8@channel,activation=int8@tensor", [jnp.ones((1, 2))], PARAMS)

    assert_equal(calibrated(jnp.full((1, 2), 100.0)), calibrated(jnp.ones((1, 2))))


def test_scales_do_not_depend_on_how_data_is_cut_into_batches_or_on_its_length():
    model = models.build(TransformerConfig(depth=1, width=16, heads=2), DataSpec("language_model", (16,), 16), 0)
    tokens = jax.random.randint(jax.random.key(0), (4, 16), 0, 16)

    whole = pl.calibrate(model, "w8a8,attention=int8@token", [tokens])
    packed = pl.convert(whole)
    apart = pl.calibrate(model, "w8a8,attention=int8@token", [tokens[:1], tokens[1:]])
    for site, roles in whole.scales.items():
        for role in roles:
            np.testing.assert_allclose(roles[role]["scale"], apart.scales[site][role]["scale"], rtol=1e-5)
    for length in (16, 8, 1):  # check 21 of notes/jax_quantization.md: other frameworks fail here
        assert nnx.jit(lambda model, x: model(x))(packed, tokens[:, :length]).shape == (4, length, 16)


def test_a_converted_static_model_keeps_its_scales_in_its_state():
    model = models.build(MLPConfig(hidden=(8,)), DataSpec("classification", (4,), 3), 0)
    x = jax.random.normal(jax.random.key(0), (5, 4))

    packed = pl.convert(pl.calibrate(model, "w8a8", [x]))
    graphdef, state = nnx.split(packed)

    assert set(state["quantization_scales"].get_raw_value()) == {"layers/0/kernel", "head/kernel"}
    doubled = jax.tree.map(lambda leaf: leaf * 2, state["quantization_scales"])
    state["quantization_scales"] = doubled
    assert not np.array_equal(nnx.merge(graphdef, state)(x), packed(x))


def test_linen_models_keep_them_in_a_collection():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(jnp.tanh(linen.Dense(8)(x)))

    x = jax.random.normal(jax.random.key(0), (5, 4))
    variables = Net().init(jax.random.key(1), x)
    calibrated = pl.calibrate(Net(), "w8a8", [x], variables)

    module, stored = pl.convert(calibrated)

    assert set(stored) == {"params", "quantization_scales"}
    assert_equal(module.apply(stored, x), calibrated(x))
    np.testing.assert_allclose(module.apply(stored, x), Net().apply(variables, x), atol=0.05)


def test_layers_in_a_scan_share_a_scale_that_covers_all_of_them():
    def fn(params, x):
        return jax.lax.scan(lambda x, w: (2 * (x @ w), None), x, params["w"])[0]

    params, x = {"w": jnp.stack([jnp.eye(2)] * 3)}, jnp.asarray([[1.0, 0.5]])

    calibrated = pl.calibrate(fn, "weight=int8@channel,activation=int8@tensor", [x], params)

    [site] = calibrated.scales
    assert float(calibrated.ranges[site, "lhs"][1]) == 4  # 1, 2 and 4 go in


def test_nonfinite_activations_are_left_out_and_named():
    with pytest.warns(UserWarning, match="NaNs and infinities at 1 operands: 'w' lhs had 1 of them"):
        calibrated = pl.calibrate(product, "w8a8", [jnp.asarray([[1.0, jnp.inf]])], PARAMS)

    assert float(calibrated.ranges["w", "lhs"][1]) == 1
    with pytest.raises(ValueError, match="calibrate saw NaNs and infinities at 1 operands: 'w' lhs had 1 of them"):
        pl.calibrate(product, "w8a8", [jnp.asarray([[1.0, jnp.inf]])], PARAMS, on_nonfinite="raise")
    with pytest.raises(ValueError, match="on_nonfinite='nan' must be 'warn' or 'raise'"):
        pl.calibrate(product, "w8a8", [jnp.ones((1, 2))], PARAMS, on_nonfinite="nan")


def test_what_cannot_be_calibrated_is_refused():
    x = jnp.ones((1, 2))

    with pytest.raises(ValueError, match="quantizes no activation with a scale that could be static"):
        pl.calibrate(product, "w4a16", [x], PARAMS)
    with pytest.raises(ValueError, match="calibrate got no batches"):
        pl.calibrate(product, "w8a8", [], PARAMS)
    with pytest.raises(ValueError, match="a static range is one for the whole tensor"):
        pl.calibrate(product, "weight=int8@channel,activation=int8@group32", [x], PARAMS)
    with pytest.raises(TypeError, match="has its policy, params and example"):
        pl.convert(pl.calibrate(product, "w8a8", [x], PARAMS), "w8a8")


STATIC = "weight=int8@channel,activation=int8@tensor"


def score(target, policy, batches, params=None):
    return pl.sensitivity(target, [policy], batches, params=params)


@pytest.mark.parametrize(("what", "run"), [("calibrate", pl.calibrate), ("sensitivity", score)])
def test_a_model_that_carries_scales_or_codes_is_refused_not_passed_over(what, run):
    """Static scales were lost without a word where no weight was packed; packed ones failed inside of JAX."""
    model, x = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((1, 2))
    dense = linen.Dense(3)
    variables = dense.init(jax.random.key(0), x)
    activations_alone = pl.convert(pl.calibrate(model, "activation=int8@tensor", [x]))
    module, packed = pl.convert(pl.calibrate(dense, "activation=int8@tensor", [x], variables))
    converted, params = pl.convert(product, "w8a8", x, params=PARAMS)
    trained = pl.prepare_qat(model, "weight=int4@channel,lsq", x)

    with pytest.raises(ValueError, match=f"{what} does not see the static scales of a converted model"):
        run(activations_alone, STATIC, [x])
    with pytest.raises(ValueError, match=f"{what} does not see the static scales"):
        run(module, STATIC, [x], packed)
    with pytest.raises(ValueError, match=f"{what} needs floating weights, and 'kernel' is stored as int4@channel"):
        run(pl.convert(model, "weight=int4@channel", x), STATIC, [x])
    with pytest.raises(ValueError, match="'w' is stored as int8@channel; give it the model from before the conversion"):
        run(product, STATIC, [x], params)
    with pytest.raises(ValueError, match="of a converted model"):
        run(converted, STATIC, [x], params)
    with pytest.raises(TypeError, match="calibrated already; give the model itself"):
        run(pl.calibrate(model, STATIC, [x]), STATIC, [x])
    with pytest.raises(ValueError, match=r"prepare_qat has trained. pl.convert\(model, None, x\) keeps them"):
        run(trained, STATIC, [x])
    run(pl.apply_policy(trained, "float32"), STATIC, [x])


@pytest.mark.parametrize("calibration", ["absmax", "percentile99.9", "mse", "kl"])
def test_calibrations_with_histograms_reach_the_sites(calibration):
    x = jax.random.normal(jax.random.key(0), (512, 2)).at[0, 0].set(40.0)

    calibrated = pl.calibrate(product, f"weight=int8@channel,activation=int4@tensor,{calibration}", [x], PARAMS)

    high = float(calibrated.ranges["w", "lhs"][1])
    assert high == 40 if calibration == "absmax" else high < 39


def test_arguments_that_are_no_arrays_have_a_program_each():
    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x, large):
            return self.second(self.first(x) * (100 if large else 1))

    model, x = Scaled(nnx.Rngs(0)), jnp.ones((1, 2))

    both = pl.calibrate(model, "w8a8", [(x, False), (x, True)])

    assert (
        both.ranges["second/kernel", "lhs"] == pl.calibrate(model, "w8a8", [(x, True)]).ranges["second/kernel", "lhs"]
    )


def test_a_site_that_no_batch_reaches_keeps_a_dynamic_scale():
    def fn(params, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ params["w"], lambda: x @ params["v"])

    params = {"w": jnp.eye(2), "v": jnp.eye(2)}

    with pytest.warns(UserWarning, match="no batch reached 1 of 2 operands, such as that of 'v'"):
        calibrated = pl.calibrate(fn, "w8a8", [jnp.ones((1, 2))], params)

    assert list(calibrated.scales) == ["w"]
    np.testing.assert_allclose(calibrated(jnp.full((1, 2), -0.01)), -0.01, rtol=0.01)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
