"""The same bits on an accelerator as on the CPU, and the pair of casts that XLA removes there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import round_to
from precision_lab.formats.casts import cast_through
from tests.formats.format_cases import (
    DETERMINISTIC,
    ML_DTYPES_FLOATS,
    NARROWER_THAN_FLOAT32,
    assert_same_numbers,
    every_bfloat16,
    every_float16,
    hard_float32,
    random_float32_bits,
)

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="compares a GPU with the CPU, and there is no GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def on_cpu(function, *args):
    """Returns what `function` gives on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(function(*args))


@pytest.mark.parametrize("fmt", [fmt for fmt in ML_DTYPES_FLOATS if fmt.has_zero], ids=str)
def test_nearest_even_gives_the_bits_of_the_cpu(fmt):
    for x in (every_float16(), every_bfloat16(), random_float32_bits(1 << 20)):
        assert_same_numbers(round_to(x, fmt), on_cpu(lambda x: round_to(x, fmt), x))


@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_every_rounding_gives_the_bits_of_the_cpu(rounding):
    for fmt in NARROWER_THAN_FLOAT32:
        for overflow in ("native", "saturate"):
            x, params = hard_float32(fmt, 4096), fmt.params(overflow=overflow)
            expected = on_cpu(lambda x, p: round_to(x, p, rounding=rounding), x, params)
            assert_same_numbers(round_to(x, params, rounding=rounding), expected)


def test_a_plain_pair_of_casts_is_removed_and_a_rounding_is_not():
    x = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    expected = x.astype(jnp.bfloat16).astype(np.float32)

    plain = jax.jit(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))(x)

    assert_same_numbers(jax.jit(lambda x: round_to(x, "bf16"))(x), expected)
    assert_same_numbers(jax.jit(lambda x: cast_through(x, jnp.bfloat16))(x), expected)
    if np.array_equal(plain, expected):
        pytest.xfail("this version of XLA keeps the plain pair of casts")


def test_nothing_is_fused_around_a_rounding():
    a, b, c = np.random.default_rng(1).standard_normal((3, 4096)).astype(np.float32)
    expected = np.asarray(a * b).astype(jnp.bfloat16).astype(np.float32) + c

    for fmt in ("bf16", formats.format("bf16").params()):
        assert_same_numbers(jax.jit(lambda a, b, c, fmt=fmt: round_to(a * b, fmt) + c)(a, b, c), expected)
