"""round_to with every kind of format: block formats and codebooks go to functions of their own, options to errors."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import round_to, round_to_blocks, round_to_codebook


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((40, 50)), jnp.float32)


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "nvfp4_2d", "bfp8@16", "mxfp8:rceil"])
def test_block_formats_go_to_round_to_blocks(x, spec):
    np.testing.assert_array_equal(round_to(x, spec), round_to_blocks(x, spec))
    np.testing.assert_array_equal(
        round_to(x, formats.format(spec), rounding="up"), round_to_blocks(x, spec, rounding="up")
    )


def test_blocks_lie_along_the_axis_that_is_given(x):
    np.testing.assert_array_equal(round_to(x, "mxfp4", axis=0), round_to(x.T, "mxfp4").T)
    np.testing.assert_array_equal(round_to(x, "nvfp4_2d", axis=(1, 0)), round_to(x.T, "nvfp4_2d").T)
    assert (round_to(x, "mxfp4", axis=0) != round_to(x, "mxfp4")).any()


def test_blocks_round_at_random_with_a_key_or_bits(x):
    key, bits = jax.random.key(1), jax.random.bits(jax.random.key(2), x.shape, jnp.uint32)

    for given in ({"key": key}, {"bits": bits}):
        rounded = round_to(x, "mxfp6", rounding="stochastic", **given)
        np.testing.assert_array_equal(rounded, round_to_blocks(x, "mxfp6", rounding="stochastic", **given))
        few = {"rounding": "stochastic", "n_bits": 3, "centred": True, **given}
        np.testing.assert_array_equal(round_to(x, "mxfp6", **few), round_to_blocks(x, "mxfp6", **few))
        assert (round_to(x, "mxfp6", **few) != rounded).any()


@pytest.mark.parametrize("book", ["nf4", "ternary", formats.codebook([-1.5, 0.25, 2])])
def test_codebooks_take_the_nearest_level(x, book):
    np.testing.assert_array_equal(round_to(x, book), round_to_codebook(x, book))


@pytest.mark.parametrize("spec", ["mxfp4", "nf4"])
def test_gradients_through_blocks_and_codebooks(x, spec):
    def gradient(name):
        return jax.jit(jax.grad(lambda x: jnp.sum(1.0301 * round_to(x, spec, gradient=name))))(x)

    np.testing.assert_array_equal(gradient("straight_through"), jnp.full_like(x, 1.0301))
    np.testing.assert_array_equal(gradient("zero"), jnp.zeros_like(x))
    np.testing.assert_array_equal(gradient("e5m2"), jnp.ones_like(x))


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "nf4"])
@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("overflow", "saturate"),
        ("overflow", "inf"),
        ("subnormals", "flush"),
        ("gradient", "clipped"),
    ],
)
def test_options_that_blocks_and_codebooks_cannot_honour_are_refused(x, spec, option, given):
    with pytest.raises(ValueError, match=f"{option}={given!r} cannot be used with {spec}"):
        round_to(x, spec, **{option: given})


@pytest.mark.parametrize(("option", "given"), [("n_bits", 4), ("centred", True)])
def test_truncated_random_bits_are_for_evenly_spaced_values(x, option, given):
    with pytest.raises(ValueError, match=f"{option}={given!r} cannot be used with nf4, which is a codebook"):
        round_to(x, "nf4", **{option: given})
    with pytest.raises(ValueError, match="say how to use random bits; give key= or bits="):
        round_to(x, "mxfp4", **{option: given})


def test_overflow_as_specified_is_what_blocks_and_codebooks_do(x):
    for spec in ("mxfp4", "nf4"):
        np.testing.assert_array_equal(round_to(x, spec, overflow="native"), round_to(x, spec))


@pytest.mark.parametrize("fmt", ["bf16", "int8", "float8_e8m0fnu", "nf4"])
def test_an_axis_is_for_blocks_only(x, fmt):
    with pytest.raises(ValueError, match=f"axis=0 cannot be used with {formats.format(fmt).name}"):
        round_to(x, fmt, axis=0)


def test_an_axis_is_refused_with_parameters(x):
    with pytest.raises(ValueError, match="axis=0 cannot be used with FormatParams"):
        round_to(x, formats.format("bf16").params(), axis=0)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("nf4", {"rounding": "up"}, "rounding='up' cannot be used with nf4: a codebook takes the nearest level"),
        ("nf4", {"rounding": "stochastic", "key": jax.random.key(0)}, "rounding='stochastic' cannot be used with nf4"),
        ("nf4", {"key": jax.random.key(0)}, "rounding='nearest_even' uses no randomness"),
        ("mxfp4", {"key": jax.random.key(0)}, "rounding='nearest_even' uses no randomness"),
        ("mxfp4", {"rounding": "stochastic"}, "needs randomness"),
        ("mxfp4", {"rounding": 0}, "rounding of mxfp4 must be a name, got 0"),
        ("nf4", {"rounding": np.int32(0)}, "rounding of nf4 must be a name"),
        ("nf4", {"rounding": "nearest"}, "rounding must be one of nearest_even"),
        ("mxfp4", {"axis": 2}, "cannot lay them along axis=2 of an array with 2 axes"),
        ("bf16", {"gradient": "mxfp4"}, "gradient='mxfp4': cotangents are rounded to floats, integers or fixed point"),
    ],
)
def test_other_options_are_refused_by_name(x, spec, options, message):
    with pytest.raises(ValueError, match=message):
        round_to(x, spec, **options)


def test_the_package_knows_blocks_and_codebooks_without_jax():
    code = (
        "import sys; from precision_lab import formats;"
        "kinds = [formats.format(name).kind for name in ('nf4', 'mxfp4', 'nvfp4', 'bfp8')];"
        "assert kinds == ['codebook', 'block', 'block', 'block'], kinds;"
        "assert 'jax' not in sys.modules, 'jax was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there():
    assert all(getattr(formats, name) is not None for name in formats.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'round_too'"):
        _ = formats.round_too


@pytest.mark.parametrize("spec", ["p=nf4", "c=nf4", "c=mxfp4", "p=mxfp4", "o=nvfp4", "**/x:compute=mxfp4"])
def test_policies_refuse_formats_without_a_dtype(spec):
    from precision_lab.policy import Policy

    with pytest.raises(ValueError, match=r"is not a floating format|cannot store floating tensors"):
        Policy.parse(spec if spec[1] == "=" else f"float32;{spec}")
