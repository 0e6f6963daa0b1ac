"""doctor: counts against NumPy's and ml_dtypes' own casts, and states that were spoilt on purpose."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import precision_lab as pl

BFLOAT16 = ml_dtypes.bfloat16


def normal(*shape, seed=0, scale=0.02, dtype=np.float32):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(dtype)


def kinds(found):
    return [one.kind for one in found.findings]


def spread(seed=0, size=5000):
    """Returns float32 values of all magnitudes from 2**-160 to 2**127, with zeros, infinities and NaNs."""
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.uniform(1, 2, size) * rng.choice([-1, 1], size), rng.integers(-160, 127, size)).astype(np.float32)
    x[:5] = 0, -0.0, np.inf, -np.inf, np.nan
    return x


CASTS = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float8_e5m2": 2.0**-14, "float8_e4m3fn": 2.0**-6}
"""The smallest normal number of each; their casts round to nearest even and make infinite or NaN what is too large."""


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_counts_are_those_of_a_cast(name, seed):
    x = spread(seed)
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)

    fit = pl.doctor(x, [name])[0].fits[0]

    with np.errstate(all="ignore"):
        cast = x.astype(dtype).astype(np.float32)
    finite = np.isfinite(x)
    zero = (x != 0) & (cast == 0)
    assert fit.overflow == np.sum(finite & ~np.isfinite(cast))
    assert fit.flushed == np.sum(zero)
    assert fit.subnormal == np.sum((x != 0) & (np.abs(x) < CASTS[name]) & ~zero)
    assert fit.changed == np.sum((cast != x) & ~np.isnan(x))


def test_the_edges_of_float16():
    """65520 is the first to overflow; half the smallest subnormal, 2**-25, is a tie and becomes zero."""
    small = np.float32(2.0**-25)
    x = np.array([65519, 65520, -65520, small, np.nextafter(small, 1), 2.0**-24, -(2.0**-15), 2.0**-14, 0], np.float32)

    fit = pl.doctor(x, ["float16"])[0].fits[0]

    assert (fit.overflow, fit.flushed, fit.subnormal) == (2, 1, 3)
    assert fit.changed == 5


def test_arrays_of_every_size_are_counted_once():
    for size in (1, 4096, 4097, 2**16 + 3, 2**20 + 5):
        x = np.tile(np.float32([0, 1e6, 1e-9, 1]), size // 4 + 1)[:size]

        leaf = pl.doctor(x, ["float16"])[0]

        assert (leaf.count, leaf.zeros) == (size, np.sum(x == 0))
        assert (leaf.fits[0].overflow, leaf.fits[0].flushed) == (np.sum(x == 1e6), np.sum(x == np.float32(1e-9)))
    assert pl.doctor(np.zeros((0, 3), np.float32))[0].count == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32", "float64"])
def test_range_and_specials_of_every_dtype(dtype):
    x = np.array([0, -0.375, 0.5, 2, -24, np.nan], np.float64).astype(getattr(ml_dtypes, dtype, dtype))

    leaf = pl.doctor({"x": jnp.asarray(x) if dtype != "float64" else x})[0]

    assert (leaf.path, leaf.dtype, leaf.shape, leaf.nbytes) == ("x", dtype, (6,), x.nbytes)
    assert (leaf.amax, leaf.amin, leaf.exponents) == (24, 0.375, (-2, 4))
    assert (leaf.zeros, leaf.infs, leaf.nans) == (1, 0, 1)


def test_float64_keeps_its_range():
    leaf = pl.doctor(np.array([1e300, 1e-300, 0.1, 1.0]), ["float32"])[0]

    assert (leaf.amax, leaf.amin) == (1e300, 1e-300)
    assert (leaf.fits[0].overflow, leaf.fits[0].flushed, leaf.fits[0].changed) == (1, 1, 3)
    assert not jax.config.jax_enable_x64


def test_values_below_the_smallest_normal_number_of_their_own_type_are_told():
    tree = {
        "half": np.array([2.0**-15, 2.0**-14, 0], np.float16),
        "single": np.array([1e-40, 1], np.float32),
        "eight": np.array([2.0**-7, 1], ml_dtypes.float8_e4m3fn),
    }

    found = pl.doctor(tree)

    assert {leaf.path: leaf.subnormal for leaf in found} == {"half": 1, "single": 1, "eight": 1}
    told = next(one for one in found.findings if one.kind == "own_subnormal")
    assert told.paths == ("single", "half")


def test_what_is_not_finite_comes_first_with_its_counts():
    tree = {"a": np.array([1, np.nan, np.inf, -np.inf], np.float32), "b": normal(8)}

    found = pl.doctor(tree)

    assert found.findings[0].kind == "nonfinite"
    assert found.findings[0].text == "not finite: 2 infinities and 1 NaN in 1 tensor: a (2 inf, 1 NaN of 4)."


def test_bfloat16_bits_read_as_float16_are_all_finite_and_found():
    """notes: 1.0 reads as 1.875, 0.02 as 1.160; N(0, 0.02**2): median 81 times as large, all finite."""
    values = normal(200, 300)
    wrong = values.astype(BFLOAT16).view(np.float16)

    found = pl.doctor({"good": values.astype(np.float16), "wrong": wrong})

    assert np.array([1, 0.02], BFLOAT16).view(np.float16).tolist() == pytest.approx([1.875, 1.160], abs=1e-3)
    assert np.median(np.abs(wrong)) / np.median(np.abs(values)) == pytest.approx(81, rel=0.1)
    assert "nonfinite" not in kinds(found)
    assert [leaf.misread_as for leaf in found] == ["", "bfloat16"]
    assert next(one for one in found.findings if one.kind == "misread").paths == ("wrong",)


WEIGHTS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "student": lambda rng, n: rng.standard_t(3, n),
    "sparse": lambda rng, n: rng.normal(size=n) * (rng.uniform(size=n) < 0.2),
}
OTHERS = {
    "norm scales": lambda rng, n: 1 + 0.1 * rng.normal(size=n),
    "signs": lambda rng, n: rng.choice([-1.0, 1.0], n),
    "two humps": lambda rng, n: rng.choice([-1, 1], n) * rng.uniform(0.5, 1.5, n),
    "squares": lambda rng, n: rng.normal(size=n) ** 2,
    "log-normal": lambda rng, n: rng.choice([-1, 1], n) * np.exp2(8 * rng.normal(size=n)),
    "log-uniform": lambda rng, n: rng.choice([-1, 1], n) * np.exp2(rng.uniform(-20, 0, n)),
    "4 bits": lambda rng, n: np.round(2 * rng.normal(size=n)),
}


@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.0, 30.0])
@pytest.mark.parametrize("name", [*WEIGHTS, *OTHERS])
def test_what_was_read_rightly_is_not_suspected(name, scale):
    x = {**WEIGHTS, **OTHERS}[name](np.random.default_rng(0), 8192) * scale

    with np.errstate(over="ignore"):
        found = pl.doctor([x.astype(np.float16), x.astype(BFLOAT16), np.arange(8192).astype(np.uint16)], [])

    assert [leaf.misread_as for leaf in found] == ["", "", ""]


@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.1])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_read_wrongly_are_found_either_way_round(name, scale):
    x = WEIGHTS[name](np.random.default_rng(1), 8192) * scale
    half, brain = x.astype(np.float16), x.astype(BFLOAT16)

    found = pl.doctor([brain.view(np.float16), half.view(BFLOAT16), half.view(np.uint16), brain.view("V2")], [])

    assert [leaf.misread_as for leaf in found] == ["bfloat16", "float16", "float16", "bfloat16"]


def test_values_that_have_been_through_fewer_bits_are_told():
    x = normal(64, 64)
    tree = {"whole": x, "brain": x.astype(BFLOAT16).astype(np.float32), "half": x.astype(np.float16).astype(np.float64)}

    found = pl.doctor(tree, ["float8_e4m3fn"])

    assert {leaf.path: leaf.narrower for leaf in found} == {"whole": "", "brain": "bfloat16", "half": "float16"}
    assert kinds(found).count("narrower") == 2


def test_constants_and_whole_numbers_are_told_and_a_scalar_is_neither():
    tree = {"bias": np.zeros(8, np.float32), "scale": np.ones(4, np.float16), "ids": np.float32([3, -7, 12]),
            "scalar": np.float32(5), "large": np.float32([2**26, 2**27]), "count": np.int32([1, 2])}  # fmt: skip

    found = pl.doctor(tree)

    assert {leaf.path: leaf.constant for leaf in found if leaf.constant is not None} == {"bias": 0, "scale": 1}
    assert {leaf.path: leaf.whole_numbers for leaf in found if leaf.whole_numbers} == {"ids": (-7, 12)}
    assert "constant: 0 in bias; 1 in scale." in str(found)


def test_findings_name_the_format_the_counts_and_the_worst_tensor():
    tree = {
        "few": np.float32([1e6, 1, 1, 0.3]),
        "many": np.float32([1e6, 1e7, 1e8, 0.3]),
        "tiny": np.float32([1e-9, 1.5]),
    }

    found = {one.kind: one for one in pl.doctor(tree, ["float16"]).findings}

    assert found["overflow"].paths == ("many", "few")
    assert found["overflow"].text == (
        "float16: 4 values would overflow (beyond 65504), in 2 tensors: many (75 %), few (25 %)."
    )
    assert found["flushed"].text == "float16: 1 value would become zero (too small for it), in 1 tensor: tiny (50 %)."


def changes(before, after):
    return {leaf.path: leaf.change for leaf in pl.doctor(after, [], against=before)}


def test_a_cast_is_told_with_what_it_lost():
    x = np.float32([1, 1 + 2**-12, 7e4, 1e-9, np.nan])
    exact = np.float32([1, 2, 0.5])

    with np.errstate(over="ignore"):
        found = changes({"x": x, "exact": exact}, {"x": x.astype(np.float16), "exact": exact.astype(BFLOAT16)})

    lost = found["x"]
    assert (lost.kind, lost.before, lost.after) == ("cast", "float32", "float16")
    assert (lost.changed, lost.overflowed, lost.zeroed, lost.max_rel) == (3, 1, 1, 1.0)
    assert (found["exact"].kind, found["exact"].changed) == ("cast", 0)


def test_bfloat16_cast_to_float16_is_nearly_always_exact():
    """notes: at least 99.9 % of N(0, 0.02**2); what is lost lies below 2**-17, where float16 has fewer bits."""
    x = normal(1000, 100).astype(BFLOAT16)

    found = changes({"x": x}, {"x": x.astype(np.float16)})["x"]

    wide = x.astype(np.float64)
    assert found.kind == "cast"
    assert found.changed == np.sum(x.astype(np.float16).astype(np.float64) != wide) <= 1e-3 * x.size
    assert found.changed <= np.sum(np.abs(wide) < 2.0**-17)


def test_bits_under_another_type_are_no_cast():
    x = normal(64, dtype=BFLOAT16)
    found = pl.doctor({"x": x.view(np.float16), "raw": x.view("V2")}, against={"x": x, "raw": x})

    assert [leaf.change.kind for leaf in found] == ["reinterpreted"] * 2
    assert found.at("x").change.changed == np.sum(x.view(np.float16).astype(np.float32) != x.astype(np.float32))
    assert "bfloat16 -> float16: the same bits under another type, not a cast, in 1 tensor" in str(found)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16])
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_a_silent_trip_through_fewer_bits_is_found(dtype, wide):
    x = np.append(normal(500, dtype=wide), wide(70000.0 if dtype == BFLOAT16 else 1e-12))

    found = changes({"x": x, "y": x}, {"x": x.astype(dtype).astype(wide), "y": x + wide(1e-3)})

    assert (found["x"].kind, found["x"].via, found["y"].kind) == ("through", np.dtype(dtype).name, "values")
    assert found["x"].changed == np.sum(x.astype(dtype).astype(wide) != x)


def test_other_values_other_shapes_and_other_arrays_are_told_apart():
    before = {"same": normal(9), "moved": normal(9), "shape": normal(9), "gone": normal(9), "both": normal(9)}
    after = {
        "same": normal(9),
        "moved": normal(9) + 1,
        "shape": normal(3),
        "new": normal(9),
        "both": np.ones(9, np.float16),
    }

    found = pl.doctor(after, [], against=before)

    assert {leaf.path: leaf.change.kind for leaf in found if leaf.change} == {
        "same": "same", "moved": "values", "shape": "shape", "both": "values"}  # fmt: skip
    told = {one.kind: one.paths for one in found.findings}
    assert (told["missing"], told["added"], told["shape"]) == (("gone",), ("new",), ("shape",))
    assert found.at("moved").change.changed == 9
    assert "every array is the same" in str(pl.doctor(before, [], against=dict(before)))


def test_integers_of_ml_dtypes_are_numbers_like_others():
    """Their kind is that of records; the same numbers in int4 were told as other values."""
    x = np.float32([-8, -1, 0, 7])
    after = {"same": x.astype(ml_dtypes.int4), "moved": (x * 0.5).astype(ml_dtypes.int4)}

    found = pl.doctor(after, [], against={"same": x, "moved": x})

    assert (found.at("same").change.kind, found.at("same").change.changed) == ("cast", 0)
    assert (found.at("moved").change.kind, found.at("moved").change.changed) == ("values", 3)


@pytest.mark.parametrize("real", [np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("whole", [np.int64, np.uint64])
def test_integers_beyond_2_to_53_are_compared_exactly_with_floats(whole, real):
    """Both were rounded to float64 first, where 2**53 + 1 is 2**53 and the largest integer is a power of two."""
    edges = [0, 1, 2**24 + 1, 2**53, 2**53 + 1, 2**62, 2**62 + 1, np.iinfo(whole).min, np.iinfo(whole).max]
    integers = np.array(edges, whole)
    floats = integers.astype(real)
    floats[1] += real(0.5)

    there, back = changes({"n": integers}, {"n": floats})["n"], changes({"n": floats}, {"n": integers})["n"]

    expected = sum(Fraction(*f.as_integer_ratio()) != n for f, n in zip(floats, edges, strict=True))
    assert there.changed == back.changed == expected
    infinite = real([np.nan, np.inf, -np.inf, 3e19, -3e19, -0.0])
    assert changes({"n": infinite}, {"n": np.zeros(6, whole)})["n"].changed == 5


def test_how_far_an_integer_moved_is_not_lost_in_rounding():
    found = changes({"n": np.int64([2**60, 5])}, {"n": np.int64([2**60 + 1, 5])})["n"]

    assert (found.kind, found.changed, found.max_rel) == ("values", 1, 2.0**-60)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="long double is float64 here")
def test_what_is_wider_than_float64_is_listed_and_told_and_its_casts_are_found():
    """It ended the run, since no format is stored so. 1 + 2**-24 + 2**-60 by way of float64 would round to 1."""
    x = np.append(normal(99, dtype=np.longdouble), np.longdouble(1) + np.ldexp(np.longdouble(1), [-24, -60]).sum())

    found = pl.doctor({"x": x, "w": normal(9)}, ["float16"])
    told = {d: changes({"x": x}, {"x": x.astype(d)})["x"] for d in (np.float32, np.float16, BFLOAT16, np.float64)}

    assert (found.at("x").reading, found.at("x").nbytes) == (None, x.nbytes)
    assert f"not counted, being wider than float64: x ({x.dtype})." in str(found)
    assert {(change.kind, change.changed > 0) for change in told.values()} == {("cast", True)}
    assert changes({"x": x}, {"x": x})["x"].kind == "same"
    assert changes({"x": np.float32(x)}, {"x": np.float32(x).astype(x.dtype)})["x"].changed == 0
    assert changes({"x": np.float32(x)}, {"x": x})["x"].kind == "values"


def test_paths_that_print_alike_are_told_apart():
    """The last of them was kept, and the others never looked at."""
    before = {"a/b": normal(3), "a": {"b": normal(4)}, "c": normal(5)}
    after = {"a": {"b": normal(4)}, "c": normal(5)}

    found, against = pl.doctor(before), pl.doctor(after, [], against=before)

    assert {leaf.path: leaf.shape for leaf in found} == {"['a/b']": (3,), "['a']['b']": (4,), "c": (5,)}
    assert {leaf.path: leaf.change.kind for leaf in against} == {"['a']['b']": "same", "c": "same"}
    assert [(one.kind, one.paths) for one in against.findings] == [("missing", ("['a/b']",))]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_the_other_byte_order_of_a_file_makes_no_difference(dtype):
    x = normal(32, 32, scale=100).astype(dtype)

    swapped, plain = pl.doctor({"w": x.astype(x.dtype.newbyteorder())}), pl.doctor({"w": x})

    assert swapped.to_dicts() == plain.to_dicts()
    assert swapped.sentences() == plain.sentences()


def test_what_training_moved_is_told_in_one_sentence_whatever_its_dtype():
    before = {"a": normal(9), "b": normal(9, dtype=np.float16), "n": np.int32(3)}
    after = {"a": normal(9, seed=1), "b": normal(9, seed=1, dtype=np.float16), "n": np.int32(4)}

    found = [one for one in pl.doctor(after, [], against=before).findings if one.kind == "values"]

    assert [set(one.paths) for one in found] == [{"a", "b", "n"}]


def test_models_states_and_keys_are_trees_too():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))

    of_model = pl.doctor(model)
    of_keys = pl.doctor({"key": jax.random.key(0), "n": 3, "none": None, "z": np.ones(2, np.complex64)})

    assert {leaf.path: leaf.shape for leaf in of_model} == {"bias": (4,), "kernel": (3, 4)}
    assert [(leaf.path, leaf.reading) for leaf in of_keys] == [("key", None), ("n", None), ("z", None)]


def test_the_result_prints_and_becomes_rows():
    found = pl.doctor({"w": normal(32, 32)}, ["float16", "float8_e4m3fn"])

    row = found.to_dicts()[0]
    assert (row["path"], row["count"]) == ("w", 1024)
    assert row["float8_e4m3fn_flushed"] == found[0].fits[1].flushed > 0
    assert "w" in str(found)
    assert "nothing to report" in str(pl.doctor({"w": np.float32([0.1, 0.2])}))
    with pytest.raises(KeyError, match="no array 'v'; there are w"):
        found.at("v")


@pytest.mark.parametrize(("tree", "formats"), [({"n": np.int32([2**31 - 1])}, ["float16"]), ({"w": normal(3)}, [])])
def test_nothing_is_said_of_formats_that_nothing_was_held_against(tree, formats):
    assert pl.doctor(tree, formats).sentences()[1:] == ["nothing to report."]


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["mxfp4"], "mxfp4 has no range of its own"),
        (["nf4"], "nf4 has no range of its own"),
        (["float8_e8m0fnu"], "float8_e8m0fnu has no sign"),
        (["flaot16"], "unknown format 'flaot16'"),
    ],
)
def test_formats_without_a_range_are_refused(formats, message):
    with pytest.raises(ValueError, match=message):
        pl.doctor({"w": normal(3)}, formats)


def test_a_tree_without_arrays_is_refused():
    with pytest.raises(ValueError, match="there are none in this dict"):
        pl.doctor({"a": None})
