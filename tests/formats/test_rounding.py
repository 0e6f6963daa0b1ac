"""round_to: bit for bit against ml_dtypes and the exact oracle, in every dtype, mode and way of calling it."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import oracle, round_to
from tests.formats.format_cases import (
    DETERMINISTIC,
    ML_DTYPES_FLOATS,
    NARROWER_THAN_FLOAT32,
    SYMMETRIC,
    assert_same_numbers,
    every_bfloat16,
    every_float16,
    hard_float32,
    random_float32_bits,
)

# NumPy warns of signalling NaNs and of overflow, which are among the inputs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
by_rounding = pytest.mark.parametrize("rounding", DETERMINISTIC)
STACKED = formats.stack_formats(NARROWER_THAN_FLOAT32)
round_static = jax.jit(round_to, static_argnames=("fmt", "rounding", "overflow"))
# One compiled program for each rounding serves all formats.
round_traced = jax.jit(lambda x, params, rounding: round_to(x, params, rounding=rounding), static_argnames="rounding")


@pytest.mark.parametrize("fmt", [fmt for fmt in ML_DTYPES_FLOATS if fmt.has_zero], ids=str)
@pytest.mark.parametrize(
    "inputs",
    [every_float16, every_bfloat16, partial(random_float32_bits, 1 << 20)],
    ids=["float16", "bfloat16", "float32"],
)
def test_nearest_even_matches_ml_dtypes(fmt, inputs):
    x = inputs()
    x = x if fmt.has_nan else x[~np.isnan(x)]

    rounded = round_static(x, fmt)

    assert rounded.dtype == x.dtype
    with np.errstate(all="ignore"):
        assert_same_numbers(rounded, x.astype(fmt.dtype).astype(np.float32).astype(x.dtype))
        assert_same_numbers(round_traced(x, fmt.params(), "nearest_even"), rounded)


@by_rounding
@pytest.mark.parametrize("overflow", ["native", "saturate"])
@pytest.mark.parametrize("fmt", NARROWER_THAN_FLOAT32, ids=str)
def test_every_rounding_matches_the_exact_oracle(fmt, overflow, rounding):
    x = hard_float32(fmt)

    rounded = round_traced(x, fmt.params(overflow=overflow), rounding)

    assert_same_numbers(rounded, oracle.round_to(x, fmt, rounding=rounding, overflow=overflow))


@pytest.mark.parametrize("fmt", NARROWER_THAN_FLOAT32, ids=str)
def test_fast_path_of_static_formats_equals_the_traced_kernel(fmt):
    x = np.concatenate([hard_float32(fmt), random_float32_bits(1 << 16, seed=1)])

    assert_same_numbers(round_static(x, fmt), round_traced(x, fmt.params(), "nearest_even"))
    assert_same_numbers(
        round_static(x, fmt, overflow="saturate"), round_traced(x, fmt.params(overflow="saturate"), "nearest_even")
    )


@by_rounding
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "int4", "e3m0:finite"])
def test_static_formats_equal_traced_ones_in_every_rounding(name, rounding):
    fmt = formats.format(name)
    x = hard_float32(fmt)

    assert_same_numbers(round_static(x, fmt, rounding=rounding), round_traced(x, fmt.params(), rounding))
    assert_same_numbers(round_to(x, name, rounding=rounding), round_static(x, fmt, rounding=rounding))


@by_rounding
def test_rounding_stacked_formats_under_vmap_equals_one_by_one(rounding):
    x = random_float32_bits(4096, seed=2)

    together = jax.vmap(partial(round_to, rounding=rounding), in_axes=(None, 0))(jnp.asarray(x), STACKED)

    for row, fmt in zip(together, NARROWER_THAN_FLOAT32, strict=True):
        assert_same_numbers(row, round_traced(x, fmt.params(), rounding))


@by_rounding
@pytest.mark.parametrize(("inputs", "largest"), [(every_float16, 65504.0), (every_bfloat16, 3.3895313892515355e38)])
def test_half_width_inputs_round_as_the_same_values_in_float32(inputs, largest, rounding):
    x = inputs()
    wide = x.astype(np.float32)

    for fmt in NARROWER_THAN_FLOAT32:
        if np.float64(fmt.max).astype(x.dtype).astype(np.float64) == fmt.max <= largest:
            expected = np.asarray(round_traced(wide, fmt.params(), rounding)).astype(x.dtype)
            assert_same_numbers(round_traced(x, fmt.params(), rounding), expected)


@pytest.mark.parametrize(
    ("dtype", "name", "largest"),
    [
        (np.float16, "bfloat16", 65280.0),
        (np.float16, "tf32", 65504.0),
        (np.float16, "int16", 32752.0),
        (ml_dtypes.bfloat16, "float16", 65280.0),
        (ml_dtypes.bfloat16, "int16", 32640.0),
        (np.float32, "float64", 3.4028234663852886e38),
    ],
)
def test_saturation_stops_at_the_largest_value_that_format_and_dtype_share(dtype, name, largest):
    fmt = formats.format(name)
    x = np.array([np.inf, -np.inf, np.nan, 1], dtype)

    rounded = round_static(x, fmt, overflow="saturate")

    assert_same_numbers(rounded, [largest, -largest, np.nan, 1])
    if name != "float64":
        assert_same_numbers(round_traced(x, fmt.params(overflow="saturate"), "nearest_even"), rounded)


def test_a_carry_beyond_a_narrow_dtype_overflows():
    """65504 rounds to 65536 in bfloat16, which float16 does not have."""
    x = np.array([65504, -65504], np.float16)

    assert_same_numbers(round_to(x, "bfloat16"), [np.inf, -np.inf])
    assert_same_numbers(round_to(x, "bfloat16", overflow="saturate"), [65280, -65280])
    assert_same_numbers(round_to(x, "bfloat16", rounding="toward_zero"), [65280, -65280])


@by_rounding
def test_rounding_twice_changes_nothing(rounding):
    x = random_float32_bits(1 << 14, seed=3)

    for fmt in NARROWER_THAN_FLOAT32:
        once = round_traced(x, fmt.params(), rounding)
        assert_same_numbers(round_traced(once, fmt.params(), rounding), once)


@by_rounding
def test_rounding_keeps_the_order(rounding):
    x = np.sort(np.nan_to_num(random_float32_bits(100_000, seed=4)))

    for fmt in NARROWER_THAN_FLOAT32:
        rounded = np.asarray(round_traced(x, fmt.params(overflow="saturate"), rounding))
        assert (rounded[1:] >= rounded[:-1]).all(), fmt


def test_rounding_is_odd_symmetric_and_up_mirrors_down():
    x = np.abs(random_float32_bits(1 << 14, seed=5))
    x = x[x > 0]

    for fmt in SYMMETRIC:
        rounded = {
            mode: [np.asarray(round_traced(s * x, fmt.params(), mode)) for s in (1, -1)] for mode in DETERMINISTIC
        }
        for mode in ("nearest_even", "nearest_away", "toward_zero", "to_odd"):
            np.testing.assert_array_equal(rounded[mode][0], -rounded[mode][1])
        np.testing.assert_array_equal(rounded["up"][1], -rounded["down"][0])
        np.testing.assert_array_equal(rounded["up"][0], -rounded["down"][1])


def test_directed_roundings_enclose_the_value():
    x = np.nan_to_num(random_float32_bits(1 << 14, seed=6))

    for fmt in NARROWER_THAN_FLOAT32:
        inside = (fmt.min <= x) & (x <= fmt.max)
        down, up, inwards = (np.asarray(round_traced(x, fmt.params(), mode)) for mode in ("down", "up", "toward_zero"))
        assert ((down <= x) & (x <= up))[inside].all(), fmt
        np.testing.assert_array_equal(inwards[inside], np.where(x > 0, down, up)[inside])


def test_rounding_to_odd_first_makes_a_second_rounding_exact():
    """Two bits more than the target are enough (Boldo and Melquiond, 2008, IEEE Trans. Computers 57)."""
    x = random_float32_bits(1 << 16, seed=7)

    between = round_to(x, "e5m12", rounding="to_odd")

    assert_same_numbers(round_to(between, "float16"), round_to(x, "float16"))


E4M3FN = [(464, 448), (465, np.nan), (-465, np.nan), (np.inf, np.nan), (480, np.nan), (0.1, 0.1015625)]
E5M2 = [(61439, 57344), (61440, np.inf), (-61440, -np.inf), (np.inf, np.inf)]
E2M1 = [(0.25, 0), (0.75, 1), (2.5, 2), (3.5, 4), (5, 4), (7, 6), (-7, -6), (np.inf, 6)]
E3M0 = [(3, 2), (0.75, 0.5), (1.5, 2), (6, 8), (0.125, 0), (0.126, 0.25)]
INT2 = [(0.5, 0), (1.5, 1), (-9, -1), (-0.4, 0.0), (-0.0, 0.0)]
TF32 = [(1 + 2**-11, 1), (1 + 3 * 2**-11, 1 + 2**-9), (3.4028234663852886e38, np.inf), (1e-45, 0)]


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("e4m3fn", E4M3FN),
        ("e5m2", E5M2),
        ("float4_e2m1fn", E2M1),
        ("e3m0:finite", E3M0),
        ("int2", INT2),
        ("tf32", TF32),
    ],
)
def test_hand_worked_values(name, cases):
    given, expected = np.float32(cases).T

    assert_same_numbers(round_to(given, name), expected)


@pytest.mark.parametrize(
    ("name", "options", "given", "expected"),
    [
        ("e4m3fn", {"overflow": "saturate"}, [465, np.inf, -1e9], [448, 448, -448]),
        ("e5m2", {"rounding": "toward_zero"}, [1e9, -1e9, np.inf], [57344, -57344, np.inf]),
        ("e5m2", {"rounding": "up"}, [1e9, -1e9], [np.inf, -57344]),
        ("e5m2", {"rounding": "down"}, [1e9, -1e9], [57344, -np.inf]),
        ("e5m2", {"rounding": "to_odd"}, [1e9, -1e9], [57344, -57344]),
        ("e5m2", {"overflow": "nan"}, [1e9, np.inf], [np.nan, np.inf]),
        ("e4m3fn", {"overflow": "nan"}, [1e9, np.inf], [np.nan, np.nan]),
        ("int8", {}, [127.5, -1e9, np.inf, 126.5, -0.5], [127, -127, 127, 126, 0]),
    ],
)
def test_overflow_and_direction(name, options, given, expected):
    fmt, x = formats.format(name), np.float32(given)
    params = fmt.params(overflow=options.get("overflow"))

    assert_same_numbers(round_to(x, name, **options), expected)
    assert_same_numbers(round_to(x, params, rounding=options.get("rounding", "nearest_even")), expected)


def test_float32_subnormals_are_not_flushed_inside_jit():
    """bfloat16 has 2**-133 and multiples; 1e-39 is nearest to 11 of them. A multiplication by 1 would give 0."""
    x = np.float32([1e-39, -1e-39, 1e-45])
    step = float.fromhex("0x1p-133")

    assert_same_numbers(round_static(x, formats.format("bf16")), [11 * step, -11 * step, 0])
    assert_same_numbers(round_static(x, formats.format("bf16"), rounding="up"), [11 * step, -10 * step, step])
    assert_same_numbers(round_static(x, formats.format("float32")), x)


@pytest.mark.parametrize("fmt", NARROWER_THAN_FLOAT32, ids=str)
def test_nan_stays_nan_and_zero_keeps_its_sign_where_the_format_has_it(fmt):
    """0x7F800001 has its only payload bit where every narrow format drops it."""
    nans = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF], np.uint32).view(np.float32)
    negative = np.float32([-0.0, -1e-45])

    assert np.isnan(round_static(nans, fmt)).all()
    assert np.isnan(round_traced(nans, fmt.params(overflow="saturate"), "up")).all()
    assert np.signbit(round_to(negative, fmt)).tolist() == [fmt.has_negative_zero] * 2


def test_one_program_per_rounding_serves_all_formats():
    traces = []

    @partial(jax.jit, static_argnames="rounding")
    def counted(x, params, rounding):
        traces.append(rounding)
        return round_to(x, params, rounding=rounding)

    for rounding in DETERMINISTIC:
        for fmt in NARROWER_THAN_FLOAT32:
            counted(np.ones(8, np.float32), fmt.params(), rounding)

    assert traces == DETERMINISTIC


def test_parameters_are_plain_numbers_that_can_be_abstract():
    params = formats.format("e4m3fn").params()

    leaves = jax.tree.leaves(params)
    jax.make_jaxpr(round_to)(jnp.ones(3), params)

    assert all(leaf.dtype == np.uint32 and leaf.shape == () for leaf in leaves)
    assert jax.tree.structure(params) == jax.tree.structure(formats.format("int8").params())
    assert all(leaf.shape == (len(NARROWER_THAN_FLOAT32),) for leaf in jax.tree.leaves(STACKED))


@pytest.mark.parametrize("fmt", ["e4m3fn", formats.format("e4m3fn").params()], ids=["static", "traced"])
def test_gradient_is_straight_through(fmt):
    """Also where the cotangent is beyond the format, where a pair of casts gives NaN, and beyond the largest value."""
    x = jnp.float32([0.1, 1e6, -3.0, 1e-30, np.inf])

    gradient = jax.grad(lambda x: 500 * jnp.sum(round_to(x, fmt)))(x)
    second = jax.jvp(jax.grad(lambda x: jnp.sum(round_to(x, fmt) ** 2)), (x[2:3],), (jnp.ones(1),))

    np.testing.assert_array_equal(gradient, jnp.full(5, 500.0))
    assert (second[0], second[1]) == (-6, 2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_works_under_strict_promotion_in_every_dtype(dtype):
    x = jnp.ones((2, 3), dtype)

    with jax.numpy_dtype_promotion("strict"):
        results = [
            round_to(x, fmt, rounding=r) for r in DETERMINISTIC for fmt in ("e5m2", formats.format("int4").params())
        ]
        gradient = jax.grad(lambda x: jnp.sum(round_to(x, "e5m2")))(x)

    assert {result.dtype for result in [*results, gradient]} == {np.dtype(dtype)}


FUSION = """
import numpy as np, jax, jax.numpy as jnp, ml_dtypes
from precision_lab import formats
from precision_lab.formats import round_to

a, b, c = np.random.default_rng(0).standard_normal((3, 4096)).astype(np.float32)
expected = (a * b).astype(ml_dtypes.bfloat16).astype(np.float32) + c
params = formats.format("bf16").params()
for rounded in (lambda x: round_to(x, "bf16"), lambda x: round_to(x, params)):
    np.testing.assert_array_equal(jax.jit(lambda a, b, c: rounded(a * b) + c)(a, b, c), expected)

# A pair of casts to float16 in between would be removed; a pair of roundings must not be.
h = (np.arange(1, 4097) / 4096).astype(np.float16)
stepwise = round_to(jnp.asarray((h.astype(np.float32) * h).astype(np.float16)), "e5m2")
fused = jax.jit(lambda h: round_to(round_to(h.astype(jnp.float32) * h, "float16").astype(jnp.float16), "e5m2"))(h)
np.testing.assert_array_equal(fused, stepwise)
"""


@pytest.mark.parametrize("flags", ["", "--xla_allow_excess_precision=true"])
def test_nothing_is_fused_or_elided_around_a_rounding(flags):
    environment = {"XLA_FLAGS": flags, "PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path.cwd())}

    subprocess.run([sys.executable, "-c", FUSION], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "e4m3fn", "e11m4", "e5m30", "int8", "float32", "float64"])
def test_float64_is_rounded_once_and_exactly(name):
    fmt = formats.format(name)
    rng = np.random.default_rng(8)
    bits = rng.integers(0, 1 << 64, 1024, dtype=np.uint64).view(np.float64)
    x = np.concatenate([bits, hard_float32(fmt).astype(np.float64), rng.standard_normal(500) * fmt.max])
    x = np.concatenate([x, np.nextafter(x, np.inf)])

    with jax.enable_x64(True):
        static = [np.asarray(round_to(x, fmt, rounding=rounding)) for rounding in DETERMINISTIC]
        traced = [
            np.asarray(round_to(x, fmt.params(container="float64"), rounding=rounding)) for rounding in DETERMINISTIC
        ]

    for rounding, one, other in zip(DETERMINISTIC, static, traced, strict=True):
        assert one.dtype == np.float64
        assert_same_numbers(one, oracle.round_to(x, fmt, rounding=rounding))
        assert_same_numbers(other, one)


def test_float64_just_above_a_tie_goes_up():
    """By way of float32 it would be on the tie; ml_dtypes gives 1.0 here."""
    with jax.enable_x64(True):
        assert round_to(np.float64(1 + 2**-4 + 2**-40), "e4m3fn") == 1.125


def test_python_floats_and_empty_arrays_are_taken():
    assert round_to(0.1, "bf16") == np.float32(0.1).astype(ml_dtypes.bfloat16)
    assert round_to(0.1, "bf16").dtype == jnp.float32
    assert round_to(jnp.zeros((0, 3), jnp.float16), "e4m3fn").shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "fmt", "options", "error", "message"),
    [
        (np.ones(2), "bf16", {}, TypeError, "float64 while jax_enable_x64 is off"),
        (jnp.ones(2, jnp.int32), "bf16", {}, TypeError, r"expects float16, .*, got int32 \(2,\)"),
        (jnp.ones(2, jnp.float8_e5m2), "e4m3fn", {}, TypeError, "got float8_e5m2"),
        (jnp.ones(2), "bf17", {}, ValueError, "unknown format 'bf17'"),
        (jnp.ones(2), "bf16", {"rounding": "nearest"}, ValueError, "must be one of nearest_even, .*'nearest'"),
        (jnp.ones(2), "bf16", {"subnormals": "drop"}, ValueError, "subnormals must be one of keep, flush, .*'drop'"),
        (jnp.ones(2), "bf16", {"overflow": "clip"}, ValueError, "overflow must be one of native, .*'clip'"),
        (jnp.ones(2), "e4m3fn", {"overflow": "inf"}, ValueError, "has no infinity. Choose 'saturate' or .* or 'nan'"),
        (jnp.ones(2), "int4", {"overflow": "nan"}, ValueError, "int4 has no NaN. Choose 'saturate'"),
        (jnp.ones(2), STACKED, {"overflow": "saturate"}, ValueError, "give it to Format.params"),
        (jnp.ones(2), formats.format("bf16").params(container="float64"), {}, ValueError, "container='float32'"),
        (jnp.ones(2), "e9m4", {}, ValueError, "e9m4 in float32 arrays: the smallest values lie where float32"),
    ],
)
def test_what_cannot_be_done_is_refused(x, fmt, options, error, message):
    with pytest.raises(error, match=message):
        round_to(x, fmt, **options)


def test_stacking_nothing_or_for_an_unknown_container_is_refused():
    with pytest.raises(ValueError, match="at least one format"):
        formats.stack_formats([])
    with pytest.raises(ValueError, match="container must be float16, bfloat16, float32 or float64, got int32"):
        formats.stack_formats(["bf16"], container="int32")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_transposed_constant_keeps_its_order_in_a_loop(dtype):
    """XLA of JAX 0.10 took its elements in the order of memory, where a called function reads their bits."""
    x = np.random.default_rng(7).standard_normal((16, 6)).astype(dtype)
    called = jax.jit(lambda x: round_to(x, "float8_e4m3fn"))

    found = jax.jit(lambda: jax.lax.map(lambda _: called(jax.lax.transpose(jnp.asarray(x), (1, 0))), jnp.arange(2)))()

    np.testing.assert_array_equal(found[1], called(x.T.copy()))
