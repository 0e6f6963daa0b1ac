"""The catalogue: derived facts against ml_dtypes, NumPy and the enumerated codes; how formats are named."""

import pickle
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import FORMATS, Format, catalogue
from tests.formats.format_cases import ALL, CODED

by_name = pytest.mark.parametrize("fmt", ALL, ids=str)


@pytest.mark.parametrize("fmt", [f for f in ALL if f.kind == "float" and f.dtype is not None], ids=str)
def test_facts_of_floats_equal_those_of_their_dtype(fmt):
    info = ml_dtypes.finfo(fmt.dtype)

    assert fmt.max == float(info.max)
    assert fmt.min_normal == float(info.smallest_normal)
    assert fmt.min_subnormal == float(info.smallest_subnormal)
    assert fmt.eps == float(info.eps)
    assert fmt.bits == info.bits
    assert (fmt.exponent_bits, fmt.mantissa_bits) == (info.nexp, info.nmant)
    assert (fmt.has_inf, fmt.has_nan) == _specials_of(fmt.dtype)


def _specials_of(dtype) -> tuple[bool, bool]:
    """Returns whether `dtype` keeps an infinity and a NaN."""
    kept = np.array([np.inf, np.nan]).astype(dtype).astype(np.float64)
    return bool(np.isinf(kept[0])), bool(np.isnan(kept[1]))


@pytest.mark.parametrize("fmt", [f for f in ALL if f.kind == "int" and f.dtype], ids=str)
def test_integers_have_the_range_of_their_dtype_symmetric_unless_full(fmt):
    info = ml_dtypes.iinfo(fmt.dtype)

    assert fmt.max == info.max
    assert fmt.min == info.min + (fmt.specials == "narrow")
    assert fmt.bits == info.bits
    assert fmt.eps == fmt.min_normal == fmt.min_subnormal == 1
    assert (fmt.has_inf, fmt.has_nan, fmt.has_negative_zero) == (False, False, False)


@pytest.mark.parametrize("fmt", CODED, ids=str)
def test_facts_equal_those_of_the_enumerated_grid(fmt):
    grid = fmt.grid()
    positive = grid[grid > 0]

    assert (np.diff(grid) > 0).all()
    assert (grid[0], positive[-1]) == (fmt.min, fmt.max)
    assert {fmt.has_zero} == {bool((grid == 0).any())}
    if fmt.signed:
        negative = grid[grid < 0][fmt.specials == "full" :]
        np.testing.assert_array_equal(positive, -negative[::-1])
    assert positive[0] == fmt.min_subnormal
    if fmt.kind == "float":
        assert positive[positive > 1][0] - 1 == fmt.eps
        assert fmt.min_normal in positive


def test_tf32_has_the_range_of_float32_and_the_precision_of_float16():
    """NVIDIA's description of the format; 3.40116213e38 is (2 - 2**-10) * 2**127."""
    tf32 = formats.format("tf32")

    assert tf32.min_normal == FORMATS["float32"].min_normal
    assert (tf32.eps, tf32.digits) == (FORMATS["float16"].eps, FORMATS["float16"].digits)
    assert tf32.max == (2 - tf32.eps) * float.fromhex("0x1p127")
    assert (tf32.bits, tf32.storage_bits) == (19, 32)


@pytest.mark.parametrize(
    ("name", "digits"),
    [("float64", 15.95), ("float32", 7.22), ("tf32", 3.31), ("bfloat16", 2.41), ("float8_e5m2", 0.90), ("int8", 2.41)],
)
def test_digits_are_the_significant_bits_in_decimal(name, digits):
    assert FORMATS[name].digits == pytest.approx(digits, abs=0.005)


@pytest.mark.parametrize(("precision", "largest", "smallest_normal"), [(3, 49152, -15), (4, 224, -7), (5, 15, -3)])
def test_p3109_formats_have_the_values_of_the_interim_report(precision, largest, smallest_normal):
    fmt = FORMATS[f"p3109_k8p{precision}"]

    assert fmt.max == largest
    assert fmt.min_normal == float.fromhex(f"0x1p{smallest_normal}")
    assert fmt.decode([0x80, 0x7F, 0xFF]).tolist() == pytest.approx([np.nan, np.inf, -np.inf], nan_ok=True)


@by_name
def test_every_format_has_a_source_and_is_found_by_its_own_name(fmt):
    assert fmt.source
    assert formats.format(fmt.name) is fmt
    assert formats.format(fmt) is fmt
    assert str(fmt) == fmt.name


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("bf16", "bfloat16"), ("BF16 ", "bfloat16"), ("f16", "float16"), ("fp16", "float16"), ("half", "float16"),
        ("full", "float32"), ("fp32", "float32"), ("f64", "float64"), ("e4m3fn", "float8_e4m3fn"),
        ("e5m2", "float8_e5m2"), ("e4m3", "float8_e4m3"), ("e4m3fnuz", "float8_e4m3fnuz"), ("fp4", "float4_e2m1fn"),
        ("i8", "int8"), ("e8m23", "float32"), ("e8m10", "tf32"), ("e8m7", "bfloat16"), ("e11m52", "float64"),
        ("e4m3:fn", "float8_e4m3fn"), ("e4m3:fnuz,bias=11", "float8_e4m3b11fnuz"), ("e2m1:finite", "float4_e2m1fn"),
        ("e5m2:p3109", "p3109_k8p3"), (jnp.bfloat16, "bfloat16"), (jnp.float32, "float32"), (np.float16, "float16"),
        (np.dtype("float64"), "float64"), (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"), (np.int8, "int8"),
        (jnp.int4, "int4"), ("u4", "uint4"), (np.uint8, "uint8"), (jnp.uint2, "uint2"), ("e8m0:fnu", "float8_e8m0fnu"),
        ("e8m0fnu", "float8_e8m0fnu"), (jnp.float8_e8m0fnu, "float8_e8m0fnu"), ("INT8:full", "int8:full"),
        ("int8:narrow", "int8"), (jnp.zeros(2, jnp.bfloat16).dtype, "bfloat16"),
    ],
)  # fmt: skip
def test_other_spellings_name_the_same_format(spec, name):
    assert formats.format(spec) is FORMATS[name]


@pytest.mark.parametrize(
    "spec",
    [
        "e5m3",
        "e5m3:bias=12,finite",
        "e3m0:finite",
        "e6m9:fn",
        "int3",
        "e4m3:bias=-2",
        "int5:full",
        "uint12",
        "fixed8.4",
        "fixed16.0",
        "ufixed6.3",
        "fixed8.12:narrow",
        "p3109_k8p1",
        "p3109_k12p7",
    ],
)
def test_generic_formats_are_found_by_their_own_name(spec):
    fmt = formats.format(spec)

    assert fmt.name == spec
    assert formats.format(fmt.name) == fmt
    assert fmt == pickle.loads(pickle.dumps(fmt))
    assert len({fmt, formats.format(spec)}) == 1


@pytest.mark.parametrize(
    ("name", "least", "largest", "step"),
    [
        ("fixed8.4", -8, 7.9375, 1 / 16),
        ("fixed8.4:narrow", -7.9375, 7.9375, 1 / 16),
        ("ufixed8.4", 0, 15.9375, 1 / 16),
        ("fixed8.6", -2, 127 / 64, 1 / 64),
        ("fixed4.6", -8 / 64, 7 / 64, 1 / 64),
        ("int3:full", -4, 3, 1),
        ("uint3", 0, 7, 1),
    ],
)
def test_integers_and_fixed_point_by_hand(name, least, largest, step):
    """Gupta et al., section 3: IL integer and FL fraction bits reach from -2**(IL-1) to 2**(IL-1) - 2**-FL."""
    fmt = formats.format(name)

    assert (fmt.min, fmt.max, fmt.eps, fmt.min_subnormal) == (least, largest, step, step)
    np.testing.assert_array_equal(fmt.grid(), np.arange(least, largest + step, step))


def test_the_scale_format_has_the_powers_of_two_and_nan():
    """OCP MX 1.0, section 5.4.1: bias 127, no zero, no sign, no infinity, 0xFF is NaN."""
    fmt = FORMATS["float8_e8m0fnu"]

    assert (fmt.bits, fmt.signed, fmt.has_zero, fmt.nan_code) == (8, False, False, 0xFF)
    assert fmt.grid().tolist() == [float.fromhex(f"0x1p{code - 127}") for code in range(255)]


def test_generic_format_follows_the_ieee_pattern():
    """e5m3 worked by hand: bias 15, largest 1.111b * 2**15, smallest 2**-14 / 8."""
    fmt = formats.format("e5m3")

    assert (fmt.bits, fmt.bias, fmt.max) == (9, 15, 1.875 * 32768)
    assert (fmt.min_normal, fmt.min_subnormal) == (1 / 16384, 1 / 131072)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flaot16", "unknown format 'flaot16'. Nearest: .*'float16'"),
        ("bfloat", "unknown format 'bfloat'. Nearest: .*'bfloat16'"),
        ("float8_e4m3fm", "Nearest: 'float8_e4m3fn'"),
        ("xyzzy", "Known: float64, .*eXmY"),
        ("", "Known: float64"),
        ("int1", "unknown format 'int1'"),
        ("int17", "unknown format 'int17'"),
        ("e5m3:biass=3", "cannot use option 'biass=3'. Options are bias=INTEGER and one of ieee, fn"),
        ("e5m3:fn,finite", "cannot use option 'finite'"),
        ("e1m2", "2 to 11 exponent bits"),
        ("e12m3", "exponent bits"),
        ("e5m60", "0 to 52 mantissa bits"),
        ("e8m7:bias=-999", "outside the range of float64"),
        (np.uint32, "no format is stored as dtype 'uint32'"),
        ("uint8:full", "unknown format 'uint8:full'"),
        ("fixed17.2", "unknown format 'fixed17.2'"),
        ("fixed8", "unknown format 'fixed8'"),
        ("p3109_k8p8", "Nearest: 'p3109_k8p"),
        ("e8m1:fnu", "no mantissa bits"),
    ],
)
def test_unknown_or_impossible_formats_are_refused_with_the_way_out(spec, message):
    with pytest.raises(ValueError, match=message):
        formats.format(spec)


@pytest.mark.parametrize("spec", [None, float, int, 16, object()])
def test_what_names_no_format_is_a_type_error(spec):
    with pytest.raises(TypeError, match="expected a format name, a dtype or a Format"):
        formats.format(spec)


def test_an_inconsistent_format_is_refused():
    with pytest.raises(ValueError, match="format 'odd' is not possible: integers have no exponent bits"):
        Format("odd", "int", 3, 4, 0, "narrow")


def test_formats_do_not_import_jax():
    code = (
        "import sys; from precision_lab import formats; from precision_lab.formats import inspect, memory, oracle;"
        "formats.stack_formats(['bf16', 'int8']); formats.format('e4m3fn').encode([0.1]); formats.format('f16').grid();"
        "assert 'jax' not in sys.modules, 'jax was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class _Ternary:
    """A registered format: any hashable object with a name and a kind."""

    name, kind = "test_ternary", "codebook"

    def __str__(self):
        return self.name


def test_registered_formats_are_found_by_name_alias_and_themselves(monkeypatch):
    for store in ("_registered", "_registered_aliases"):
        monkeypatch.setattr(catalogue, store, dict(getattr(catalogue, store)))
    monkeypatch.setattr(catalogue, "_finders", [])
    added = _Ternary()
    formats.register(added, "t3")
    formats.register_finder(lambda name: added if name.startswith("t3:") else None)

    assert formats.format("test_ternary") is formats.format("T3") is formats.format(added) is added
    assert formats.format("t3:anything") is added
    with pytest.raises(ValueError, match="Nearest: 'test_ternary'"):
        formats.format("test_ternry")
    with pytest.raises(ValueError, match=r"'bf16' is taken by .*bfloat16"):
        formats.register(added, "bf16")
