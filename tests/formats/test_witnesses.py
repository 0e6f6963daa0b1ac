"""Independent witnesses: gfloat for every rounding it has, and XLA's own casts."""

import gfloat
import gfloat.formats as gf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gfloat import Domain, RoundMode

from precision_lab import formats
from precision_lab.formats import round_to
from precision_lab.formats.casts import cast_through
from tests.formats.format_cases import (
    ALL,
    GENERIC,
    ML_DTYPES_FLOATS,
    assert_same_numbers,
    hard_float32,
    random_float32_bits,
)

MODES = {
    "nearest_even": RoundMode.TiesToEven,
    "nearest_away": RoundMode.TiesToAway,
    "toward_zero": RoundMode.TowardZero,
    "up": RoundMode.TowardPositive,
    "down": RoundMode.TowardNegative,
}
FLOATS = [
    fmt
    for fmt in ALL + GENERIC + [formats.format("p3109_k8p2"), formats.format("p3109_k6p3")]
    if fmt.kind == "float" and fmt.has_zero and fmt.mantissa_bits and fmt.name not in ("float32", "float64")
]
PUBLISHED = {
    "float16": gf.format_info_binary16,
    "bfloat16": gf.format_info_bfloat16,
    "float8_e5m2": gf.format_info_ocp_e5m2,
    "float8_e4m3fn": gf.format_info_ocp_e4m3,
    "float6_e2m3fn": gf.format_info_ocp_e2m3,
    "float6_e3m2fn": gf.format_info_ocp_e3m2,
    "float4_e2m1fn": gf.format_info_ocp_e2m1,
    "float8_e8m0fnu": gf.format_info_ocp_e8m0,
    "fixed8.6": gf.format_info_ocp_int8,
    **{f"p3109_k{k}p{p}": gf.format_info_p3109(k, p) for k, p in ((8, 2), (8, 3), (8, 4), (8, 5), (6, 3))},
}


def gfloat_info(fmt):
    """Returns gfloat's own description where it has one, else one built from the format's definition."""
    if fmt.name in PUBLISHED:
        return PUBLISHED[fmt.name]
    high_nans = {"ieee": (1 << fmt.mantissa_bits) - 1, "fn": 1, "fnuz": 0, "finite": 0}[fmt.specials]
    return gfloat.FormatInfo(
        fmt.name,
        fmt.bits,
        fmt.mantissa_bits + 1,
        bias=fmt.bias,
        is_signed=True,
        domain=Domain.Extended if fmt.specials == "ieee" else Domain.Finite,
        has_nz=fmt.specials != "fnuz",
        num_high_nans=high_nans,
        has_subnormals=True,
        is_twos_complement=False,
    )


def witnessed(fmt, x, mode, saturate=False, **options):
    """Returns what gfloat makes of `x`; its float64 arithmetic is exact on these inputs."""
    return gfloat.round_ndarray(gfloat_info(fmt), x.astype(np.float64), mode, saturate, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_facts_agree_with_gfloat(name):
    fmt, info = formats.format(name), PUBLISHED[name]

    assert (fmt.bits, fmt.max, fmt.min) == (info.k, info.max, info.min)
    assert fmt.min_subnormal == info.smallest
    assert (fmt.has_inf, fmt.has_nan) == (info.num_posinfs > 0, info.num_nans > 0)
    assert [gfloat.decode_float(info, code).fval for code in range(1 << fmt.bits)][:256] == pytest.approx(
        fmt.decode(np.arange(1 << fmt.bits)).tolist()[:256], rel=0, abs=0, nan_ok=True
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("overflow", ["native", "saturate"])
@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_every_rounding_agrees_with_gfloat(fmt, overflow, rounding):
    x = hard_float32(fmt, 4096)
    x = x if fmt.has_nan else x[~np.isnan(x)]
    saturates = overflow == "saturate" or fmt.native_overflow == "saturate"

    rounded = round_to(x, fmt, rounding=rounding, overflow=overflow)

    assert_same_numbers(rounded, witnessed(fmt, x, MODES[rounding], saturates))


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "up", "down"])
def test_scale_format_agrees_with_gfloat(rounding):
    """Ties go to the even code in both; gfloat also answers for values that the format does not have."""
    fmt = formats.format("float8_e8m0fnu")
    x = hard_float32(fmt, 4096)
    x = x[(x >= np.float32(fmt.min)) & (x <= np.float32(fmt.max))]

    assert_same_numbers(round_to(x, fmt, rounding=rounding), witnessed(fmt, x, MODES[rounding]))


def test_fixed_point_agrees_with_gfloats_int8():
    fmt = formats.format("fixed8.6")
    x = np.random.default_rng(0).uniform(-2.2, 2.2, 4096).astype(np.float32)

    for rounding, mode in MODES.items():
        assert_same_numbers(round_to(x, fmt, rounding=rounding), witnessed(fmt, x, mode, True))


@pytest.mark.parametrize(
    ("n_bits", "centred", "mode"),
    [
        (3, False, RoundMode.StochasticFastest),
        (7, False, RoundMode.StochasticFastest),
        (7, True, RoundMode.StochasticFast),
    ],
)
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "p3109_k8p4", "float4_e2m1fn"])
def test_hardware_like_stochastic_rounding_agrees_with_gfloat(name, n_bits, centred, mode):
    fmt = formats.format(name)
    x = np.random.default_rng(1).standard_normal(4096).astype(np.float32) * np.float32(min(fmt.max / 8, 100))
    bits = np.random.default_rng(2).integers(0, 1 << n_bits, x.shape, np.uint32)

    rounded = round_to(x, fmt, rounding="stochastic", bits=bits, n_bits=n_bits, centred=centred, overflow="saturate")

    assert_same_numbers(rounded, witnessed(fmt, x, mode, True, srbits=bits.astype(np.int64), srnumbits=n_bits))


@pytest.mark.parametrize("fmt", [fmt for fmt in FLOATS if fmt.bits <= 16], ids=str)
def test_float64_agrees_with_gfloat(fmt):
    rng = np.random.default_rng(3)
    x = rng.standard_normal(4096) * np.float64(10.0) ** rng.integers(-8, 8, 4096)
    x[:3] = 1 + 2**-4 + 2**-40, 1 + 2**-8 + 2**-50, 1 + 2**-3 - 2**-45

    with jax.enable_x64(True):
        rounded = np.asarray(round_to(x, fmt, overflow="saturate"))

    assert_same_numbers(rounded, witnessed(fmt, x, RoundMode.TiesToEven, True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fmt", [f for f in ML_DTYPES_FLOATS if f.has_zero] + [formats.format("float32")], ids=str)
def test_real_casts_agree_with_the_emulation(fmt, as_users_compile):
    """XLA's other way of emitting code rounds to float16 first on the way to the types that LLVM has not."""
    x = np.concatenate([hard_float32(fmt) if fmt.bits <= 16 else [], random_float32_bits(1 << 16)]).astype(np.float32)
    x = x if fmt.has_nan else x[~np.isnan(x)]

    cast = jax.jit(lambda x: cast_through(x, fmt.dtype), compiler_options=as_users_compile)(x)

    assert_same_numbers(cast, round_to(x, fmt))


def test_real_cast_to_the_scale_format_breaks_ties_upwards():
    """XLA and ml_dtypes send every float32 just above 2**-127 to 2**-126; gfloat and we to the nearer of the two."""
    x = random_float32_bits(1 << 16)
    x = x[~((np.abs(x) > np.float32(2**-127)) & (np.abs(x) < np.float32(2**-126)))]

    assert_same_numbers(cast_through(x, jnp.float8_e8m0fnu), round_to(x, "e8m0fnu", rounding="nearest_away"))


def test_gradient_of_a_real_cast_is_straight_through():
    """A plain pair of casts makes NaN of 500 in float8_e4m3fn."""
    gradient = jax.grad(lambda x: 500.03 * cast_through(x, jnp.float8_e4m3fn))(1.5)

    assert gradient == np.float32(500.03)
    with pytest.raises(TypeError, match="casts floats to a floating dtype and back, got float32 and 'int8'"):
        cast_through(1.0, "int8")
