"""Simulated accumulation. Oracle: a Python loop that adds and rounds run by run with NumPy and ml_dtypes."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from precision_lab import formats
from precision_lab.policy.accumulator import Accumulator
from precision_lab.rewrite.accumulate import accumulated_convolution, accumulated_matmul
from precision_lab.rewrite.bilinear import Term, convolution


def with_mantissa(bits):
    """Rounds to so many stored bits, in range; scaling by powers of two and `rint` are exact."""

    def rounded(x):
        fraction, exponent = np.frexp(np.float64(x))
        return np.float32(np.ldexp(np.rint(np.ldexp(fraction, bits + 1)), exponent - bits - 1))

    return rounded


def through(dtype):
    return lambda x: np.float32(x).astype(dtype).astype(np.float32)


# Compiled once per accumulator and shape; `test_jit_vmap_and_leading_axes_change_no_bit` compares with what is not.
compiled_matmul = jax.jit(accumulated_matmul, static_argnums=2)

ROUND = {
    "float32": np.float32,
    "float16": through(np.float16),
    "bfloat16": through(ml_dtypes.bfloat16),
    "float8_e5m2": through(ml_dtypes.float8_e5m2),
    "float8_e4m3fn": through(ml_dtypes.float8_e4m3fn),
    "tf32": with_mantissa(10),
    "e8m13": with_mantissa(13),
}


def summed(left, right, accum):
    """The sum of products of two vectors; every run must be exact in float32, or its order would matter."""
    total = sum_ = np.float32(0)
    promote = accum.promote or len(left) + accum.step
    for first in range(0, len(left), accum.step):
        run = math.fsum(float(x) * float(y) for x, y in zip(left[first:], right[first : first + accum.step]))  # noqa: B905
        assert np.float32(run) == run
        if run:
            sum_ = ROUND[accum.format.name](sum_ + np.float32(run))
        last = first + accum.step >= len(left)
        if accum.promote and (last or (first + accum.step) % promote == 0):
            total, sum_ = (total + sum_ if sum_ else total), np.float32(0)
    return total if accum.promote else sum_


def summed_matmul(lhs, rhs, accum):
    out = np.empty((*lhs.shape[:-1], rhs.shape[-1]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for index in np.ndindex(out.shape):
            *leading, row, column = index
            out[index] = summed(lhs[(*leading, row)], rhs[(*leading, slice(None), column)], accum)
    return out


def coarse(shape, seed, scale=1.0):
    """Multiples of 1/8 up to 2, so that float32 adds their products exactly in any order."""
    return (np.random.default_rng(seed).integers(-16, 17, shape) / 8 * scale).astype(np.float32)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))


OPTIONS = ["", "@step4", "@step37", "@promote8", "@step4@promote16"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ROUND)
def test_a_product_is_added_and_rounded_run_by_run(name, options):
    """K = 37 is ragged for every step and promotion here."""
    lhs, rhs, accum = coarse((2, 3, 37), 0), coarse((2, 37, 4), 1), Accumulator.parse(name + options)

    out = compiled_matmul(jnp.asarray(lhs), jnp.asarray(rhs), accum)

    assert_same_bits(out, summed_matmul(lhs, rhs, accum))


@pytest.mark.parametrize("name", ROUND)
def test_products_one_by_one_match_for_operands_of_every_size(name):
    """Products of float16 are exact in float32; large ones overflow the narrow formats, as each of them does."""
    rng = np.random.default_rng(2)
    lhs, rhs = (
        (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 7, shape)).astype(np.float16).astype(np.float32)
        for shape in ((5, 64), (64, 6))
    )
    accum = Accumulator.parse(name)

    out = compiled_matmul(jnp.asarray(lhs), jnp.asarray(rhs), accum)

    expected = summed_matmul(lhs, rhs, accum)
    assert_same_bits(out, expected)
    assert np.isfinite(expected).all() == (name != "float8_e4m3fn")


def truncated(bits):
    """Drops all but so many stored bits; scaling by powers of two and `trunc` are exact."""

    def rounded(x):
        fraction, exponent = np.frexp(np.float64(x))
        return np.float32(np.ldexp(np.trunc(np.ldexp(fraction, bits + 1)), exponent - bits - 1))

    return rounded


@pytest.mark.parametrize("options", OPTIONS)
def test_a_truncating_accumulator_drops_the_bits_that_do_not_fit(options, monkeypatch):
    monkeypatch.setitem(ROUND, "e8m4", truncated(4))
    lhs, rhs = coarse((2, 3, 37), 0), coarse((2, 37, 4), 1)
    accum = Accumulator.parse(f"e8m4{options}@toward_zero")

    out = compiled_matmul(jnp.asarray(lhs), jnp.asarray(rhs), accum)

    assert_same_bits(out, summed_matmul(lhs, rhs, accum))


@pytest.mark.parametrize("options", ["", "@step3", "@promote64", "@step4@promote64"])
def test_a_stochastic_accumulator_is_right_on_average_where_nearest_stalls(options):
    """To nearest, bfloat16 stands still at 256 when 41/32 is added; 2000 sums, four standard errors."""
    k, accum = 1024, Accumulator.parse(f"bfloat16{options}@stochastic")
    lhs, rhs = np.full((2000, k), 41 / 32, np.float32), np.ones((k, 1), np.float32)

    sums = np.asarray(compiled_matmul(lhs, rhs, accum)).ravel()

    if "promote" not in options:
        assert_same_bits(through(ml_dtypes.bfloat16)(sums), sums)
    assert sums.std() > 0
    assert abs(sums.mean() - k * 41 / 32) <= 4 * sums.std() / math.sqrt(len(sums))


def test_equal_operands_are_rounded_alike_and_exact_sums_are_not_changed():
    x, y = coarse((4, 64), 1), coarse((64, 4), 2)
    accum = Accumulator.parse("bfloat16@stochastic")

    assert_same_bits(compiled_matmul(x, y, accum), compiled_matmul(x, y, accum))
    assert_same_bits(compiled_matmul(x[:, :8], np.ones((8, 1), np.float32), accum), x[:, :8].sum(1, keepdims=True))


def test_overflow_is_that_of_the_format():
    lhs, rhs = jnp.full((1, 5), 256.0), jnp.full((5, 1), 100.0)

    results = [
        compiled_matmul(lhs, rhs, Accumulator.parse(spec)).item()
        for spec in ("float16", "float16@step2@promote2", "float8_e4m3fn", "float4_e2m1fn", "bfloat16")
    ]

    # 2 * 25600 is in range of float16, 3 * 25600 is not; all multiples are on bfloat16's grid, whose step there is 512.
    np.testing.assert_equal(results, [np.inf, 128000.0, np.nan, 6.0, 128000.0])


# The sum of n ones stalls where one more is half a step or less: 2**(p) for p significant bits, a run times that for
# runs.
STALLS = {
    "float16": (4096, 2048),
    "bfloat16": (4096, 256),
    "float8_e4m3fn": (4096, 16),
    "e8m13": (20000, 16384),
    "float16@step4": (16384, 8192),
    "e8m13@step32": (600_000, 524_288),
    "float32": (4096, 4096),
    "bfloat16@promote128": (4096, 4096),
    "float16@promote4096": (8192, 4096),
    "e8m13@step32@promote128": (600_000, 600_000),
}


@pytest.mark.parametrize("spec", STALLS)
def test_a_sum_of_ones_stalls_where_the_format_says(spec):
    count, expected = STALLS[spec]

    out = compiled_matmul(jnp.ones((1, count)), jnp.ones((count, 1)), Accumulator.parse(spec))

    assert out.item() == expected


def test_a_stalled_sum_is_that_of_numpys_float16():
    ones = np.ones(4096, np.float16)

    expected = np.add.accumulate(ones)[-1]

    out = compiled_matmul(jnp.asarray(ones)[None], jnp.asarray(ones)[:, None], Accumulator.parse("float16"))
    assert out.item() == expected == 2048


@pytest.mark.parametrize("spec", ["float32@step64", "float32@step1000", "float32", "float32@step4@promote32"])
def test_in_float32_it_is_the_product_to_accumulation_order(spec):
    rng = np.random.default_rng(3)
    lhs, rhs = (rng.standard_normal(shape, dtype=np.float32) for shape in ((8, 64), (64, 8)))

    out = compiled_matmul(jnp.asarray(lhs), jnp.asarray(rhs), Accumulator.parse(spec))

    # Two sums in any order: each within (K + 1) * 2**-24 of the sum of magnitudes (Higham 2002, section 3.1).
    bound = 65 * 2.0**-24 * (abs(lhs).astype(np.float64) @ abs(rhs))
    assert (abs(out - lhs.astype(np.float64) @ rhs) <= bound).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("options", ["", "@step4", "@promote8", "@step4@promote16"])
def test_zeros_after_the_last_element_change_no_bit(name, options):
    """Tiny negative products become -0 in the accumulator, to which IEEE addition of +0 would give +0."""
    lhs, rhs, accum = coarse((3, 21), 4, 2.0**-13), coarse((21, 50), 5, 2.0**-13), Accumulator.parse(name + options)
    lhs[0, 5:] = 0

    out = compiled_matmul(jnp.asarray(lhs), jnp.asarray(rhs), accum)

    wider = [jnp.asarray(np.concatenate([x, np.zeros_like(x)], axis)) for x, axis in ((lhs, 1), (rhs, 0))]
    assert_same_bits(compiled_matmul(*wider, accum), out)
    negative_zeros = np.signbit(out) & (np.asarray(out) == 0)
    assert negative_zeros.any() == (name != "bfloat16" and not accum.promote)


@pytest.mark.parametrize("options", ["", "@step4", "@step64"])
def test_a_sum_of_negative_zeros_is_positive_zero(options):
    out = compiled_matmul(jnp.zeros((2, 6)), -jnp.ones((6, 3)), Accumulator.parse("float16" + options))

    assert_same_bits(out, np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("spec", ["float16", "e8m13@step4@promote16"])
def test_jit_vmap_and_leading_axes_change_no_bit(spec):
    lhs, rhs, accum = (
        jnp.asarray(coarse((2, 3, 4, 37), 6)),
        jnp.asarray(coarse((2, 3, 37, 5), 7)),
        Accumulator.parse(spec),
    )

    def product(left, right):
        return accumulated_matmul(left, right, accum)

    out, compiled = product(lhs, rhs), jax.jit(product)
    assert_same_bits(compiled(lhs, rhs), out)
    assert_same_bits(np.stack([[compiled(*pair) for pair in zip(*rows, strict=True)] for rows in zip(lhs, rhs)]), out)  # noqa: B905
    assert_same_bits(jax.jit(jax.vmap(jax.vmap(product)))(lhs, rhs), out)
    assert_same_bits(jax.jit(jax.vmap(product, (None, 0)))(lhs[0], rhs), np.stack([compiled(lhs[0], r) for r in rhs]))


def test_traced_formats_under_vmap_are_the_formats_one_by_one():
    names = ["float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"]
    lhs, rhs, accum = (
        jnp.asarray(coarse((3, 37), 8)),
        jnp.asarray(coarse((37, 4), 9)),
        Accumulator.parse("float16@step4"),
    )

    out = jax.jit(jax.vmap(lambda traced: accumulated_matmul(lhs, rhs, accum, traced=traced)))(
        formats.stack_formats(names)
    )

    expected = [compiled_matmul(lhs, rhs, Accumulator.parse(f"{name}@step4")) for name in names]
    assert_same_bits(out, np.stack(expected))
    assert len({row.tobytes() for row in np.asarray(out)}) == len(names)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_operands_in_their_own_dtype_are_their_values(dtype):
    lhs, rhs = (jnp.asarray(coarse(shape, 10)).astype(dtype) for shape in ((3, 9), (9, 4)))
    accum = Accumulator.parse("bfloat16@step2")

    out = compiled_matmul(lhs, rhs, accum)

    assert_same_bits(out, compiled_matmul(lhs.astype(jnp.float32), rhs.astype(jnp.float32), accum))


def test_it_runs_inside_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    lhs, rhs = jnp.asarray(coarse((4, 9), 11)), jnp.asarray(coarse((9, 4), 12))
    accum = Accumulator.parse("float16@step2@promote4")

    sharded = jax.shard_map(
        lambda l, r: compiled_matmul(l, r, accum), mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )

    assert_same_bits(jax.jit(sharded)(lhs, rhs), compiled_matmul(lhs, rhs, accum))


def test_memory_is_that_of_the_result_not_of_its_partial_sums():
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 4096), (4096, 64))]

    compiled = jax.jit(lambda l, r: accumulated_matmul(l, r, Accumulator.parse("float16@step4"))).lower(*like).compile()

    # All partial sums are 1024 such results; copies of the operands are 64 each.
    assert compiled.memory_analysis().temp_size_in_bytes < 160 * 64 * 64 * 4


@pytest.mark.parametrize("spec", ["float16", "float16@step4@promote8"])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 0, 2), (0, 5, 2), (3, 5, 0)])
def test_empty_products_are_zeros(m, k, n, spec):
    out = compiled_matmul(jnp.ones((m, k)), jnp.ones((k, n)), Accumulator.parse(spec))

    assert_same_bits(out, np.zeros((m, n), np.float32))


def test_nan_and_infinity_stay_where_they_are():
    lhs = jnp.asarray([[1.0, jnp.nan, 1.0], [1.0, jnp.inf, 1.0], [1.0, 1.0, 1.0]])

    out = compiled_matmul(lhs, jnp.ones((3, 1)), Accumulator.parse("float16@step2"))

    np.testing.assert_array_equal(out[:, 0], [np.nan, np.inf, 3.0])


def test_operands_that_do_not_fit_are_refused():
    accum = Accumulator.parse("float16")

    with pytest.raises(TypeError, match="floating lhs of up to 32 bits, got int32"):
        accumulated_matmul(jnp.ones((2, 2), int), jnp.ones((2, 2)), accum)
    with pytest.raises(ValueError, match=r"got \(2, 8\) and \(6, 2\)"):
        accumulated_matmul(jnp.ones((2, 8)), jnp.ones((6, 2)), accum)
    with pytest.raises(ValueError, match=r"got \(3, 2, 8\) and \(8, 2\)"):
        accumulated_matmul(jnp.ones((3, 2, 8)), jnp.ones((8, 2)), accum)
    with pytest.raises(ValueError, match="float64 is native only"):
        accumulated_matmul(jnp.ones((2, 2)), jnp.ones((2, 2)), Accumulator.parse("float64"))


NHWC = ("NHWC", "HWIO", "NHWC")
CONVS = {
    "same": ((2, 4, 4, 3), (3, 3, 3, 2), {"padding": "SAME", "dimension_numbers": NHWC}),
    "strided": ((2, 5, 6, 3), (3, 2, 3, 2), {"window_strides": (2, 3), "dimension_numbers": NHWC}),
    "dilated": ((1, 7, 6, 2), (3, 2, 2, 3), {"rhs_dilation": (2, 3), "dimension_numbers": NHWC}),
    "transposed": (
        (1, 3, 3, 2),
        (3, 3, 2, 3),
        {"padding": ((2, 1), (0, 2)), "lhs_dilation": (2, 3), "dimension_numbers": NHWC},
    ),
    "cropped": ((1, 6, 6, 2), (2, 2, 2, 3), {"padding": ((-1, -2), (1, -1)), "dimension_numbers": NHWC}),
    "grouped": ((2, 4, 4, 6), (3, 3, 2, 6), {"padding": "SAME", "feature_group_count": 3, "dimension_numbers": NHWC}),
    "depthwise": ((1, 4, 4, 3), (3, 3, 1, 6), {"padding": "SAME", "feature_group_count": 3, "dimension_numbers": NHWC}),
    "batch_groups": (
        (6, 4, 4, 2),
        (3, 3, 2, 6),
        {"padding": "SAME", "batch_group_count": 3, "dimension_numbers": NHWC},
    ),
    "channels_first": ((2, 3, 4, 5), (2, 3, 2, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    "odd_layout": ((4, 2, 5, 3), (2, 2, 3, 3), {"dimension_numbers": ("HNWC", "OHWI", "CWNH")}),
    "one_axis": ((2, 7, 2), (3, 2, 3), {"padding": ((2, 0),), "dimension_numbers": ("NWC", "WIO", "NWC")}),
    "three_axes": ((1, 3, 3, 3, 2), (2, 2, 2, 2, 2), {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}),
    "window_too_wide": ((1, 2, 4, 1), (3, 3, 1, 2), {"dimension_numbers": NHWC}),
}


def traced_convolution(case):
    """The operands of a case, the convolution as JAX takes it, and the parameters of its equation."""
    lhs_shape, rhs_shape, options = CONVS[case]
    options = {"window_strides": (1,) * (len(lhs_shape) - 2), "padding": "VALID", **options}
    lhs, rhs = coarse(lhs_shape, 13), coarse(rhs_shape, 14)

    def conv(l, r):
        return lax.conv_general_dilated(l, r, **options)

    [eqn] = jax.make_jaxpr(conv)(lhs, rhs).eqns
    return lhs, rhs, conv, eqn


def summed_convolution(lhs, rhs, params, accum):
    """Every output element by itself, its terms in the promised order: window position, then feature of the group."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    images, kernel = lhs.transpose(lhs_spec), rhs.transpose(rhs_spec)
    window, sizes, outputs = kernel.shape[2:], images.shape[2:], kernel.shape[0]
    low_high, grow = params["padding"], params["lhs_dilation"]
    lengths = [(s - 1) * d + 1 + lo + hi for s, d, (lo, hi) in zip(sizes, grow, low_high, strict=True)]
    reaches = [(k - 1) * d + 1 for k, d in zip(window, params["rhs_dilation"], strict=True)]
    strides = params["window_strides"]
    counts = [max((n - k) // s + 1, 0) for n, k, s in zip(lengths, reaches, strides, strict=True)]
    batches, features = params["batch_group_count"], params["feature_group_count"]
    n, c = images.shape[0] // batches, kernel.shape[1]
    out = np.zeros((n, outputs, *counts), np.float32)

    def pixel(image, channel, position):
        from_first = [p - lo for p, (lo, _) in zip(position, low_high, strict=True)]
        if any(q < 0 or q % d or q // d >= s for q, d, s in zip(from_first, grow, sizes, strict=True)):
            return np.float32(0)
        return images[(image, channel, *(q // d for q, d in zip(from_first, grow, strict=True)))]

    for index in np.ndindex(out.shape):
        image, o, *place = index
        image += o // (outputs // batches) * n
        first = o // (outputs // features) * c
        left, right = [], []
        for at in itertools.product(*map(range, window)):
            where = [p * s + k * d for p, s, k, d in zip(place, strides, at, params["rhs_dilation"], strict=True)]
            left += [pixel(image, first + i, where) for i in range(c)]
            right += [kernel[(o, i, *at)] for i in range(c)]
        out[index] = summed(left, right, accum)
    return out.transpose(np.argsort(out_spec))


@pytest.mark.parametrize("spec", ["float8_e5m2", "bfloat16@step2@promote4"])
@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_is_added_and_rounded_in_the_promised_order(case, spec):
    lhs, rhs, conv, eqn = traced_convolution(case)
    accum = Accumulator.parse(spec)

    out = jax.jit(lambda l, r: accumulated_convolution(l, r, eqn.params, accum))(lhs, rhs)

    assert out.shape == jax.eval_shape(conv, lhs, rhs).shape
    assert_same_bits(out, summed_convolution(lhs, rhs, eqn.params, accum))


@pytest.mark.parametrize(
    "case", ["same", "strided", "dilated", "transposed", "depthwise", "batch_groups", "odd_layout"]
)
def test_convolutions_and_both_their_gradients_are_jaxs_where_float32_is_exact(case):
    lhs, rhs, conv, eqn = traced_convolution(case)
    cotangent = coarse(jax.eval_shape(conv, lhs, rhs).shape, 15)
    op = convolution(eqn.primitive, tuple(eqn.params.items()), lhs.shape, rhs.shape)
    undefined = [type("Undefined", (), {"aval": jax.ShapeDtypeStruct(x.shape, x.dtype)}) for x in (lhs, rhs)]
    accum = Accumulator.parse("float32@step3@promote6")

    def all_three(l, r, ct):
        terms = (Term(op, l, r), op.to_lhs(ct, undefined[0], r), op.to_rhs(ct, l, undefined[1]))
        return [evaluated(term, accum) for term in terms]

    actual = jax.jit(all_three)(lhs, rhs, cotangent)

    out, pullback = jax.vjp(conv, lhs, rhs)
    for one, expected in zip(actual, (out, *pullback(cotangent)), strict=True):
        np.testing.assert_array_equal(one, expected)


def evaluated(term, accum):
    """Evaluates a term as `Convolution.multiply` does, its convolution accumulated."""
    jaxpr = term.op.jaxpr.jaxpr
    values = dict(zip(jaxpr.invars, (term.lhs, term.rhs), strict=True))
    for eqn in jaxpr.eqns:
        given = [values.get(atom, getattr(atom, "val", None)) for atom in eqn.invars]
        if eqn.primitive.name == "conv_general_dilated":
            values[eqn.outvars[0]] = accumulated_convolution(*given, eqn.params, accum)
        else:
            values[eqn.outvars[0]] = eqn.primitive.bind(*given, **eqn.params)
    return values[jaxpr.outvars[0]]


def test_a_convolution_under_vmap_is_each_of_them():
    lhs, rhs, _, eqn = traced_convolution("grouped")
    accum, batch = Accumulator.parse("float8_e5m2@step2"), np.stack([lhs, lhs[::-1], -2 * lhs])

    @jax.jit
    def conv(l):
        return accumulated_convolution(l, rhs, eqn.params, accum)

    assert_same_bits(jax.jit(jax.vmap(conv))(batch), np.stack([conv(l) for l in batch]))


def test_a_nan_reaches_only_the_outputs_whose_window_holds_it():
    lhs = jnp.zeros((1, 5, 5, 1)).at[0, 0, 0, 0].set(jnp.nan)
    [eqn] = jax.make_jaxpr(lambda l, r: lax.conv_general_dilated(l, r, (1, 1), "VALID", dimension_numbers=NHWC))(
        lhs, jnp.ones((3, 3, 1, 1))
    ).eqns

    out = accumulated_convolution(lhs, jnp.ones((3, 3, 1, 1)), eqn.params, Accumulator.parse("float16"))

    assert np.argwhere(np.isnan(out)).tolist() == [[0, 0, 0, 0]]
