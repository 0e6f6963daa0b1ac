"""The same bits on an accelerator as on the CPU, and the pair of casts that XLA removes there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import round_to
from precision_lab.formats.block_rounding import encode_blocks, round_to_blocks
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


REFERENCE = np.load(Path(__file__).with_name("reference.npz"))
MX = ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e2m3", "mxfp4", "mxint8"]


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


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("name", MX)
def test_blocks_give_the_bits_of_the_cpu(name, rule):
    """The CPU's are torchao's and gfloat's, see test_block_rounding; shifted by powers of two to reach every scale."""
    spec = name if rule == "floor" else f"{name}:{rule}"
    words = REFERENCE["mx_inputs"].view(np.uint32)

    for x in (REFERENCE["mx_inputs"], (words & 0x80FFFFFF).view(np.float32), random_float32_bits(1 << 16)):
        assert_same_numbers(round_to_blocks(x, spec), on_cpu(lambda x: round_to_blocks(x, spec), x))
        stored, expected = encode_blocks(x, spec), on_cpu(lambda x: encode_blocks(x, spec).codes, x)
        np.testing.assert_array_equal(stored.codes, expected)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d"])
def test_nvfp4_is_transformer_engines_algorithm_bit_for_bit(name):
    """Its float operations are rounded one by one on every backend; a fused or an approximate one would show."""
    stored = encode_blocks(REFERENCE["nvfp4_inputs"], name)

    np.testing.assert_array_equal(stored.codes, REFERENCE[f"te/{name}/codes"])
    np.testing.assert_array_equal(stored.scales, REFERENCE[f"te/{name}/scales"])
    assert_same_numbers(stored.decode(), REFERENCE[f"te/{name}/values"])
    assert_same_numbers(round_to_blocks(REFERENCE["nvfp4_inputs"], name), REFERENCE[f"te/{name}/values"])


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
