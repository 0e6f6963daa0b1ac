"""Options of round_to: subnormals, overflow, the scale format, a traced rounding mode, gradients."""

import io
import itertools
import tokenize
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import ROUNDINGS, oracle, round_to
from precision_lab.formats.options import OVERFLOWS, SUBNORMALS, overflow_action
from tests.formats.format_cases import (
    DETERMINISTIC,
    NARROWER_THAN_FLOAT32,
    ROUNDABLE,
    assert_same_numbers,
    every_bfloat16,
    every_float16,
    hard_float32,
    random_float32_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FLOATS = [fmt for fmt in NARROWER_THAN_FLOAT32 if fmt.kind == "float"]
OWN_SUBNORMALS = [fmt for fmt in FLOATS if fmt.min_exponent > -126]
E8M0 = formats.format("float8_e8m0fnu")
round_traced = jax.jit(lambda x, params, rounding: round_to(x, params, rounding=rounding), static_argnames="rounding")
# One compiled program for all roundings and formats.
round_any = jax.jit(lambda x, params, mode, bits: round_to(x, params, rounding=mode, bits=bits))


def rounded_in_one_program(fmts, inputs, **options):
    """Rounds each input to its format, all compiled at once, which takes half as long as one by one."""
    return jax.jit(lambda xs: [round_to(x, fmt, **options) for fmt, x in zip(fmts, xs, strict=True)])(inputs)


def has_overflow(fmt, overflow):
    try:
        overflow_action(fmt, overflow)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("subnormals", ["flush", "denormals_are_zero", "round"])
def test_every_way_with_subnormals_matches_the_oracle(subnormals, rounding):
    inputs = [hard_float32(fmt, 1024) for fmt in FLOATS]
    for fmt, x in zip(FLOATS, inputs, strict=True):
        x[:200] = np.random.default_rng(0).uniform(-2, 2, 200) * fmt.min_normal

    every = rounded_in_one_program(FLOATS, inputs, rounding=rounding, subnormals=subnormals)

    for fmt, x, rounded in zip(FLOATS, inputs, every, strict=True):
        assert_same_numbers(rounded, oracle.round_to(x, fmt, rounding=rounding, subnormals=subnormals))
        if subnormals != "round" or fmt in OWN_SUBNORMALS:
            assert_same_numbers(round_traced(x, fmt.params(subnormals=subnormals), rounding), rounded)


@pytest.mark.parametrize("subnormals", SUBNORMALS)
def test_stochastic_rounding_with_subnormals_matches_the_oracle(subnormals):
    for fmt in FLOATS:
        x = (np.random.default_rng(1).uniform(-2, 2, 512) * fmt.min_normal).astype(np.float32)
        options = {"subnormals": subnormals, "rounding": "stochastic", "bits": random_float32_bits(512).view(np.uint32)}

        assert_same_numbers(round_to(x, fmt, **options), oracle.round_to(x, fmt, **options))


@pytest.mark.parametrize(
    ("value", "flush", "daz", "rounded"), [(0.2421875, 0.25, 0, 0.25), (0.140625, 0, 0, 0.25), (0.125, 0, 0, 0)]
)
def test_three_ways_without_subnormals_by_hand(value, flush, daz, rounded):
    """e3m4 has 0.25 as its smallest normal number and steps of 1/64 below it; 0.2421875 is 15.5 of them."""
    expected = {"flush": flush, "denormals_are_zero": daz, "round": rounded}

    for subnormals, result in expected.items():
        assert float(round_to(value, "e3m4", subnormals=subnormals)) == result


def test_a_tie_between_zero_and_the_smallest_normal_number_goes_away_if_asked():
    assert float(round_to(0.125, "e3m4", subnormals="round", rounding="nearest_away")) == 0.25
    assert float(round_to(1e-39, "bf16", subnormals="round", rounding="up")) == float.fromhex("0x1p-126")


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_every_overflow_matches_the_oracle(overflow, rounding):
    known = [fmt for fmt in ROUNDABLE if has_overflow(fmt, overflow)]
    inputs = [hard_float32(fmt, 512) for fmt in known]

    every = rounded_in_one_program(known, inputs, rounding=rounding, overflow=overflow)

    for fmt, x, rounded in zip(known, inputs, every, strict=True):
        assert_same_numbers(rounded, oracle.round_to(x, fmt, rounding=rounding, overflow=overflow))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float8_e5m2", [57344, np.inf, -np.inf]),
        ("float8_e4m3fn", [448, np.nan, np.nan]),
        ("int8:full", [127, 127, -128]),
        ("uint8", [255, 255, 0]),
        ("fixed8.4", [7.9375, 7.9375, -8]),
    ],
)
def test_saturating_finite_values_leaves_infinities_to_the_format(name, expected):
    assert_same_numbers(round_to(np.float32([1e9, np.inf, -np.inf]), name, overflow="saturate_finite"), expected)


def test_unsigned_and_full_range_integers_by_hand():
    x = np.float32([-0.0, -0.4, -0.6, -3, 0.5, 1.5, 254.5, 255.4, 300, np.nan, -128.4, -129])

    assert_same_numbers(round_to(x, "uint8"), [0, 0, 0, 0, 0, 2, 254, 255, 255, np.nan, 0, 0])
    assert_same_numbers(round_to(x, "int8:full"), [0, 0, -1, -3, 0, 2, 127, 127, 127, np.nan, -128, -128])


@pytest.mark.parametrize("inputs", [every_bfloat16, partial(random_float32_bits, 1 << 16)])
def test_scale_format_matches_ml_dtypes(inputs):
    """ml_dtypes sends every float32 just above 2**-127 to 2**-126, nearer or not; those are left out."""
    x = inputs()
    wide = np.abs(x.astype(np.float32))
    x = x[~((wide > np.float32(2**-127)) & (wide < np.float32(2**-126)))]

    rounded = round_to(x, E8M0, rounding="nearest_away")

    assert_same_numbers(rounded, x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32))


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("overflow", ["native", "saturate"])
def test_scale_format_matches_the_oracle(overflow, rounding):
    x = np.concatenate([hard_float32(E8M0), random_float32_bits(2048)])

    rounded = round_to(x, E8M0, rounding=rounding, overflow=overflow)

    assert_same_numbers(rounded, oracle.round_to(x, E8M0, rounding=rounding, overflow=overflow))
    with jax.enable_x64(True):
        wide = x.astype(np.float64) * 2.0**-3
        doubled = round_to(wide, E8M0, rounding=rounding, overflow=overflow)
    assert_same_numbers(doubled, oracle.round_to(wide, E8M0, rounding=rounding, overflow=overflow))


def test_scale_format_by_hand():
    """Zero, negative numbers and infinities are NaN or the nearest value; 3 is a tie between the codes of 2 and 4."""
    x = np.float32([0, -0.0, -3, np.inf, -np.inf, np.nan, 3, 1e-45, 3.4e38])
    least, most = float.fromhex("0x1p-127"), float.fromhex("0x1p127")
    nan = np.nan

    away = round_to(x, E8M0, rounding="nearest_away")
    clamped = round_to(x, E8M0, rounding="nearest_even", overflow="saturate")

    assert_same_numbers(away, [nan, nan, nan, nan, nan, nan, 4, least, nan])
    assert_same_numbers(clamped, [least, least, least, most, least, nan, 2, least, most])
    assert_same_numbers(round_to(x[6:], E8M0, rounding="up"), [4, least, nan])
    assert_same_numbers(round_to(x[6:], E8M0, rounding="toward_zero"), [2, least, most])


def test_one_program_serves_every_format_and_traced_rounding():
    """Bit for bit what the named rounding gives; the compilation cache holds one entry."""
    x = random_float32_bits(1024, seed=2)
    bits = random_float32_bits(1024, seed=3).view(np.uint32)

    for fmt in NARROWER_THAN_FLOAT32:
        for index, rounding in enumerate(ROUNDINGS):
            given = bits if rounding == "stochastic" else None
            expected = round_to(x, fmt.params(), rounding=rounding, bits=given)
            assert_same_numbers(round_any(x, fmt.params(), np.int32(index), bits), expected)

    assert round_any._cache_size() == 1


def test_traced_rounding_works_under_vmap_for_static_formats_and_half_widths():
    x = every_float16()[::64]

    together = jax.vmap(lambda mode: round_to(x, "e4m3fn", rounding=mode))(jnp.arange(6))

    for row, rounding in zip(together, DETERMINISTIC, strict=True):
        assert_same_numbers(row, round_to(x, "e4m3fn", rounding=rounding))


def test_an_index_that_is_no_rounding_makes_everything_nan():
    assert np.isnan(round_to(jnp.ones(3), "bf16", rounding=jnp.int32(99))).all()
    assert np.isnan(round_to(jnp.ones(3), "bf16", rounding=-1)).all()
    assert np.isnan(round_to(jnp.ones(3), "bf16", rounding=list(ROUNDINGS).index("stochastic"))).all()
    with pytest.raises(TypeError, match=r"a name or an integer without axes, got 1\.5"):
        round_to(1.0, "bf16", rounding=1.5)
    with pytest.raises(TypeError, match="a name or an integer without axes"):
        round_to(1.0, "bf16", rounding=jnp.arange(2))


@pytest.mark.parametrize("traced", [False, True])
def test_gradients_by_name(traced):
    fmt = formats.format("e4m3fn")
    x = jnp.float32([0.1, 448, 449, -1e6, 1e-30])

    def gradient(name):
        return jax.grad(lambda x: 500 * jnp.sum(round_to(x, fmt.params() if traced else fmt, gradient=name)))(x)

    np.testing.assert_array_equal(gradient("straight_through"), [500] * 5)
    np.testing.assert_array_equal(gradient("clipped"), [500, 500, 0, 0, 500])
    np.testing.assert_array_equal(gradient("zero"), [0] * 5)


def test_clipped_gradient_knows_the_least_value_of_unsigned_formats():
    gradient = jax.grad(lambda x: jnp.sum(round_to(x, "uint8", gradient="clipped")))(jnp.float32([-1, 0, 255, 256]))

    np.testing.assert_array_equal(gradient, [0, 1, 1, 0])


def test_cotangent_is_rounded_to_another_format_and_only_that():
    """1.0301 is between 1 and 1.25 in E5M2; the value is rounded to E4M3FN as before."""
    value, gradient = jax.value_and_grad(lambda x: 1.0301 * round_to(x, "e4m3fn", gradient="e5m2"))(jnp.float32(1.3))

    assert gradient == 1
    assert value == np.float32(1.0301) * np.float32(1.25)


@pytest.mark.parametrize("name", ["straight_through", "clipped", "zero", "float8_e5m2"])
def test_gradients_work_with_random_bits_and_a_traced_rounding(name):
    key = jax.random.key(0)

    def loss(x, mode):
        drawn = round_to(x, "e4m3fn", rounding="stochastic", key=key, gradient=name)
        return jnp.sum(drawn + round_to(x, "e4m3fn", rounding=mode, gradient=name))

    gradient = jax.jit(jax.grad(loss))(jnp.ones(4), 0)

    np.testing.assert_array_equal(gradient, np.zeros(4) if name == "zero" else np.full(4, 2.0))


@pytest.mark.parametrize(
    ("fmt", "options", "message"),
    [
        ("int8", {"subnormals": "flush"}, "int8 has no subnormal numbers. Choose 'keep'"),
        (E8M0, {"subnormals": "round"}, "has no subnormal numbers"),
        ("bf16", {"gradient": "ste"}, "gradient must be one of straight_through, .* or a format, got 'ste'"),
        (formats.format("e5m2").params(), {"subnormals": "flush"}, "subnormals='flush' with FormatParams"),
        ("e8m7:bias=120", {}, "e8m7:bias=120 in float32 arrays: the smallest values lie where float32"),
    ],
)
def test_what_a_format_cannot_have_is_refused(fmt, options, message):
    with pytest.raises(ValueError, match=message):
        round_to(jnp.ones(2), fmt, **options)


def test_what_traced_parameters_cannot_say_is_refused():
    with pytest.raises(ValueError, match="bfloat16 has the subnormals of float32, and traced parameters cannot ask"):
        formats.format("bf16").params(subnormals="round")
    with pytest.raises(ValueError, match="parameters cannot say that a format has no zero; give the format itself"):
        E8M0.params()
    with pytest.raises(ValueError, match=r"float16 does not reach down to 5\.87747e-39"):
        round_to(jnp.ones(2, jnp.float16), E8M0)


def test_no_line_of_the_package_computes_with_inexact_exponent_functions():
    """XLA's exp2 and log2 are inexact and frexp differs between versions (see the kernel's docstring)."""
    banned = {"log2", "exp2", "ldexp", "frexp", "float_power", "power", "pow"}

    for path in Path(formats.__file__).parent.parent.rglob("*.py"):
        text = path.read_text()
        if not any(name in text for name in banned):
            continue  # reading a whole package token by token takes seconds
        tokens = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        called = {name for dot, name in itertools.pairwise(tokens) if dot == "."}
        assert not called & banned, path
