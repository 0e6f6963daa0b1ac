"""Quantizers as data: strings, equality by meaning, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_lab import formats
from precision_lab.formats import ROUNDINGS
from precision_lab.quant import (
    CALIBRATIONS,
    ESTIMATORS,
    SCHEMES,
    Granularity,
    Quantizer,
    fake_quantize,
    granularity,
    quantizer,
)

FORMATS = ["int4", "int8", "uint8", "float8_e4m3fn", "e3m2", "fixed8.4", "nf4", "ternary", "mxfp4:rceil", "bfloat16"]


@given(
    st.sampled_from(FORMATS),
    st.sampled_from([None, "tensor", "channel", "token", "group32", "block16x8"]),
    st.sampled_from([None, *SCHEMES]),
    st.sampled_from([None, *CALIBRATIONS]),
    st.sampled_from([1.0, 0.9, 0.123456789, 1e-05]),
    st.sampled_from(list(ROUNDINGS)),
    st.sampled_from(list(ESTIMATORS)),
    st.sampled_from(["float32", "float16", "float8_e4m3fn", "double"]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_possible_quantizer_prints_as_what_it_parses_from(
    fmt, shared, scheme, calibration, clip, rounding, estimator, scale_format, reciprocal
):
    percentile = 99.9 if calibration == "percentile" else None
    try:
        shape = fmt, shared, scheme, calibration, percentile, clip
        qz = Quantizer(*shape, rounding, estimator, None, scale_format, reciprocal)
    except ValueError:
        return

    assert quantizer(str(qz)) == qz
    assert hash(quantizer(str(qz))) == hash(qz)
    assert eval(repr(qz), {"quantizer": quantizer}) == qz


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("int4@group32", " INT4 @ per_group(32), symmetric, minmax ".replace(" @ ", "@")),
        ("int8:full@channel", "int8@channel,full"),
        ("int4:full,affine", "int4,affine"),
        ("nf4", "nf4@group64,absmax"),
        ("int8,ewgs", "int8,ewgs=0.001"),
        ("e4m3fn@token", "float8_e4m3fn@per_token"),
        ("ternary,absmean", "ternary"),
        ("int4,percentile99", "int4,calibration=percentile99.0"),
    ],
)
def test_two_spellings_of_one_meaning_are_equal(one, other):
    assert quantizer(one) == quantizer(other)
    assert str(quantizer(one)) == str(quantizer(other))


def test_a_format_a_dtype_and_a_quantizer_are_quantizers():
    assert quantizer(formats.format("int4")) == quantizer("int4")
    assert quantizer(jnp.float8_e4m3fn) == quantizer("e4m3fn")
    assert quantizer(quantizer("nf4,double")) == quantizer("nf4,double")


def test_options_of_a_format_stay_with_it():
    qz = quantizer("e5m3:bias=12,finite,symmetric,mse")

    assert qz.format == formats.format("e5m3:bias=12,finite")
    assert (qz.scheme, qz.calibration) == ("symmetric", "mse")
    assert quantizer("mxint8:full,even").format == formats.format("mxint8:full,even")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int44", "unknown format 'int44'. Nearest"),
        ("int4,afine", "unknown option 'afine'. Nearest: affine"),
        ("int4,mse,kl", "calibration is given twice, 'mse' and 'kl'"),
        ("int4@group", "granularity 'group', sizes"),
        ("int4@grup32", "quantizer 'int4@grup32': unknown granularity 'grup32'. Nearest: 'group32'"),
        ("int4@per_chanel,mse", "Nearest: 'channel'"),
        ("int4@tokens8", "Nearest: 'token'"),
        ("int4@blok8x4", "Nearest: 'block8x4'"),
        ("int4@32", "unknown granularity '32'. Nearest: 'group32'"),
        ("int4@row", "unknown granularity 'row'. Expected tensor, channel"),
        ("int44@grup32", "unknown format 'int44'. Nearest"),
        ("mxfp4@chanel", "after 'mxfp4@' goes a block size, as in 'mxfp4@16'"),
        ("int4@group0", "granularity 'group', sizes"),
        ("int4,clip=x", "clip= needs a number"),
        ("int4,clip=1.5", "clip must be in"),
        ("int4,percentile101", r"percentile must be in \(0, 100\]"),
        ("nf4,affine", "scheme 'affine' is for integers"),
        ("float8_e4m3fn,kl", "counts integer levels; say 'mse'"),
        ("mxfp4@group16", "block formats have scales of their own"),
        ("bfloat16@channel", "no scales for granularity channel"),
        ("bfloat16,lsq", "is for integers"),
        ("nf4,stochastic", "a codebook takes the nearest level"),
        ("uint4,signed_max", "is for signed integers"),
        ("float8_e8m0fnu", "has no zero"),
        ("float64", "leave the array as it is"),
        ("int4,scale=int8", "scales are float32"),
        ("int4,scale=float4_e2m1fn", "with zero and NaN"),
        ("int4,dorefa", "say 'uint4,dorefa'"),
        ("uint4,dorefa,reciprocal", "no scale of ours whose reciprocal"),
        ("mxfp4,reciprocal", "no scale of ours whose reciprocal could be taken; leave out 'reciprocal'"),
        ("int4,reciprocal,reciprocal", "reciprocal is given twice"),
        ("int4,tanh=2", "alpha, in"),
        ("int4,affine,absmean", "gives a scale"),
        ("int8:full,pow2", "is for the narrow integers; say 'int8'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_way_out(spec, message):
    with pytest.raises(ValueError, match=message):
        quantizer(spec)


@pytest.mark.parametrize("spec", ["tensor", "per_channel", "group(32)", "block 128x64", "per_block(4,8)"])
def test_granularities_print_as_what_they_parse_from(spec):
    assert granularity(str(granularity(spec))) == granularity(spec)


def test_runs_follow_the_contracted_axis():
    shape = (3, 5, 64, 8)

    assert Granularity("channel").runs(shape, (0, 1, 2)) == (None, None, None, 1)
    assert Granularity("token").runs(shape, -1) == (1, 1, 1, None)
    assert Granularity("group", (32,)).runs(shape, (0, 1, 2)) == (1, 1, 32, 1)
    assert Granularity("block", (16, 4)).runs(shape, 0) == (1, 1, 16, 4)
    with pytest.raises(ValueError, match="needs axis="):
        Granularity("channel").runs(shape, None)
    with pytest.raises(ValueError, match="names no axes"):
        Granularity("channel").runs(shape, 4)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_clamped_cast_takes_what_is_too_large_as_the_largest_value(name):
    largest = float(formats.format(name).max)
    x = np.float32([1.5, -largest, 3.4e38, np.inf, -np.inf, np.nan])

    clamped = np.asarray(fake_quantize(x, f"{name},clamped"))

    np.testing.assert_array_equal(clamped[:5], [1.5, -largest, largest, largest, -largest])
    assert np.isnan(clamped[5])
    inside = np.float32(np.random.default_rng(0).normal(size=100))
    np.testing.assert_array_equal(fake_quantize(inside, f"{name},clamped"), fake_quantize(inside, f"{name},unscaled"))


@pytest.mark.parametrize("spec", ["int4,clamped", "nf4,clamped", "float6_e3m2fn,clamped", "float16@channel,clamped"])
def test_a_clamped_cast_of_what_has_nothing_beyond_its_largest_value_is_refused(spec):
    with pytest.raises(ValueError, match="clamped"):
        quantizer(spec)
