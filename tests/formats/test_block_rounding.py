"""Blocks: bit for bit against torchao, gfloat, TransformerEngine's algorithm and exact fractions."""

import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import block_oracle, block_scales, oracle, round_to
from precision_lab.formats.block_rounding import encode_blocks, round_to_blocks
from precision_lab.formats.blocks import BLOCK_FORMATS, block_format
from precision_lab.formats.containers import as_word

REFERENCE = np.load(Path(__file__).with_name("reference.npz"))
MX = [name for name in BLOCK_FORMATS if name.startswith("mx")]
RULES = ("floor", "ceil", "even", "rceil")
SPECS = [*BLOCK_FORMATS, "mxfp4:rceil", "mxint8:full,even", "bfp8@16", "bfp5@7:ceil", "mxfp8@8x4"]
# (shape, axis) for blocks along one axis and for tiles.
RAGGED = {1: [((5, 33), None), ((3, 70, 2), 1)], 2: [((17, 47), None), ((20, 3, 9), (0, 2))]}


def assert_same_bits(actual, expected):
    """Checks bits, except that all NaNs are equal."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    same = (actual == expected) & (np.signbit(actual) == np.signbit(expected)) | (actual != actual) & (
        expected != expected
    )
    assert same.all(), f"{(~same).sum()} differ, first {actual[~same][:3]} for {expected[~same][:3]}"


def hard_blocks(count, length, seed=0):
    """Returns (count, length) float32 of all exponents, subnormals included, spread over twenty binades in a block."""
    rng = np.random.default_rng(seed)
    field = np.clip(rng.integers(0, 255, (count, 1)) - rng.integers(0, 20, (count, length)), 0, 254).astype(np.uint32)
    words = field << 23 | rng.integers(0, 1 << 23, (count, length)).astype(np.uint32)
    words[::3] &= np.uint32(0xFFF00000)
    return (words | rng.integers(0, 2, (count, length)).astype(np.uint32) << 31).view(np.float32)


def with_rule(name, rule):
    return block_format(name if rule == "floor" else f"{name}{',' if ':' in name else ':'}{rule}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name in MX if name != "mxint8"])
def test_codes_and_scales_are_torchaos(name, rule):
    """Scale exponents and element codes of 128 blocks, ties, edges and zeros included; torchao has no MXINT8."""
    encoded = encode_blocks(REFERENCE["mx_inputs"], with_rule(name, rule))

    np.testing.assert_array_equal(encoded.scales[:, 0], REFERENCE[f"torchao/{name}/{rule}/scales"][:, 0])
    np.testing.assert_array_equal(encoded.codes, REFERENCE[f"torchao/{name}/{rule}/codes"])


@pytest.mark.parametrize("name", MX)
def test_values_are_gfloats(name):
    """Gfloat's MXINT8 uses the code of -2."""
    spec = "mxint8:full" if name == "mxint8" else name

    rounded = np.asarray(round_to_blocks(REFERENCE["mx_inputs"], spec))

    # gfloat has no negative zero in integers, nor have we, and keeps it in floats, as we do.
    assert_same_bits(rounded, REFERENCE[f"gfloat/{name}"])


@pytest.mark.parametrize("name", ["mxfp6_e2m3", "mxint8:full"])
def test_the_installed_gfloat_agrees(name):
    info = gfloat.formats.format_info_mxint8 if "int" in name else gfloat.formats.format_info_mxfp6_e2m3
    x = np.random.default_rng(3).standard_normal((8, 32)).astype(np.float32)

    rows = [gfloat.quantize_block(info, row.astype(np.float64), gfloat.compute_scale_amax) for row in x]

    assert_same_bits(round_to_blocks(x, name), np.array(rows).astype(np.float32))


def test_the_reference_says_which_versions_wrote_it():
    assert set(json.loads(str(REFERENCE["versions"]))) >= {"torch", "torchao", "gfloat", "ml_dtypes"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*MX, "mxint8:full", "bfp12@32"])
def test_every_rule_matches_exact_fractions(name, rule):
    fmt = with_rule(name, rule)
    x = hard_blocks(16, 32)

    for rounding in ("nearest_even", "toward_zero", "up"):
        rounded = np.asarray(round_to_blocks(x, fmt, rounding=rounding))
        for row, given in zip(rounded, x, strict=True):
            exact = block_oracle.round_block([Fraction(float(value)) for value in given], fmt, rounding=rounding)
            for value, expected in zip(row, exact, strict=True):
                # Beyond float32 there is the largest value below, tested on its own.
                assert Fraction(float(value)) == expected or abs(expected) >= 2**128


@pytest.mark.parametrize("spec", ["mxfp8:ceil", "mxfp4:rceil", "mxint8:even", "mxfp8_e5m2:ceil"])
@pytest.mark.parametrize(("dtype", "largest"), [(np.float32, 2.0**128), (np.float16, 65536.0), ("bfloat16", 2.0**128)])
def test_no_value_is_rounded_beyond_its_dtype(spec, dtype, largest):
    x = jnp.full(32, jnp.finfo(dtype).max, dtype)

    rounded = np.asarray(round_to_blocks(x, spec)).astype(np.float64)

    assert np.isfinite(rounded).all()
    assert (rounded > largest / 2).all()
    assert_same_bits(encode_blocks(x, spec).decode(), round_to_blocks(x, spec))


def test_hand_worked_scales():
    """127.99999 has exponent 6, and 957 is cut to 896 under a scale of 2 that is 4 when rounded up."""
    x = np.zeros((2, 32), np.float32)
    x[0, 0], x[1, 0] = 127.99999, 957

    floor, rceil = encode_blocks(x, "mxfp8"), encode_blocks(x, "mxfp8:rceil")

    np.testing.assert_array_equal(floor.scales[:, 0], [127 + 6 - 8, 127 + 9 - 8])
    assert floor.decode()[0, 0] == 112
    assert (floor.decode()[1, 0], rceil.decode()[1, 0]) == (896, 960)


@pytest.mark.parametrize("name", MX)
def test_zero_blocks_have_the_smallest_scale_and_keep_their_signs(name):
    x = np.zeros((2, 32), np.float32)
    x[1] = -0.0

    encoded = encode_blocks(x, name)

    assert (np.asarray(encoded.scales) == 0).all()
    has_sign = block_format(name).element.has_negative_zero
    assert_same_bits(encoded.decode(), x if has_sign else np.zeros_like(x))


@pytest.mark.parametrize("name", [*MX, "bfp6@8"])
@pytest.mark.parametrize("power", [-100, 20, -20, 100])
def test_a_power_of_two_commutes_with_the_rounding(name, power):
    x = np.random.default_rng(5).standard_normal((16, 32)).astype(np.float32)
    factor = np.float32(2.0**power)

    assert_same_bits(round_to_blocks(x * factor, name), np.asarray(round_to_blocks(x, name)) * factor)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_nvfp4_is_transformer_engines_algorithm_bit_for_bit(name, transform):
    x = REFERENCE["nvfp4_inputs"]
    expected = {key: REFERENCE[f"te/{name}/{key}"] for key in ("codes", "scales", "tensor_scale", "values")}

    encoded = transform(partial(encode_blocks, fmt=name))(x)

    np.testing.assert_array_equal(encoded.codes, expected["codes"])
    np.testing.assert_array_equal(encoded.scales, expected["scales"])
    assert encoded.tensor_scale == expected["tensor_scale"]
    assert_same_bits(transform(partial(round_to_blocks, fmt=name))(x), expected["values"])


def test_nvfp4_is_near_torchaos():
    """Torchao divides where TransformerEngine multiplies, and keeps block scales at 2**-6 or above."""
    encoded = encode_blocks(REFERENCE["nvfp4_inputs"], "nvfp4")
    ours, theirs = np.asarray(encoded.decode()), REFERENCE["torchao/nvfp4"]

    kept = formats.format("float8_e4m3fn").decode(np.asarray(encoded.scales)).repeat(16, 1) >= 2**-6

    assert 0.9 < kept.mean() < 1
    np.testing.assert_allclose(ours[kept], theirs[kept], rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4_2d"])
def test_nvfp4_of_zeros_is_zeros(spec):
    for x in (np.zeros((16, 32), np.float32), np.eye(32, dtype=np.float32)):
        rounded = np.asarray(round_to_blocks(x, spec))
        assert_same_bits(rounded, x)


def test_a_given_amax_replaces_that_of_the_array():
    x = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)

    same = round_to_blocks(x, "nvfp4", tensor_amax=np.abs(x).max())
    cut = np.asarray(round_to_blocks(x, "nvfp4", tensor_amax=0.5))

    assert_same_bits(same, round_to_blocks(x, "nvfp4"))
    # 448 * 6 steps of the array's scale reach the given amax; rounding of products may exceed it by their error.
    assert np.abs(cut).max() <= 0.5 * (1 + 2**-22)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [*((spec, "float32") for spec in SPECS), ("mxfp8:ceil", "float16"), ("nvfp4", "bfloat16"), ("mxint8", "bfloat16")],
)
def test_what_is_stored_decodes_to_the_rounded_array(spec, dtype):
    """For ragged shapes, several axes, and blocks with infinities and NaNs."""
    fmt, rng = block_format(spec), np.random.default_rng(1)
    for shape, axis in RAGGED[len(fmt.block)]:
        x = (rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))).astype(jnp.dtype(dtype))
        x.flat[0] = np.inf if axis is None else np.nan

        rounded, encoded = round_to_blocks(x, fmt, axis=axis), encode_blocks(x, fmt, axis=axis)

        assert rounded.dtype == x.dtype
        assert_same_bits(encoded.decode(), rounded)
        assert encoded.codes.shape == shape
        assert encoded.scales.size == fmt.blocks(shape, axis)
        stored = encoded.codes.size * fmt.element.bits + encoded.scales.size * 8 + 32 * fmt.tensor_scale
        assert encoded.bits_per_element == Fraction(stored, x.size)


@pytest.mark.parametrize("spec", ["mxfp8", "mxfp4:rceil", "mxint8", "bfp5@7:ceil"])
def test_axes_and_padding_are_those_of_the_plain_blocks(spec):
    fmt = block_format(spec)
    x = np.random.default_rng(4).standard_normal((3, 50, 4)).astype(np.float32)

    along = np.asarray(round_to_blocks(x, fmt, axis=1))

    assert_same_bits(along, np.moveaxis(np.asarray(round_to_blocks(np.moveaxis(x, 1, 2), fmt)), 2, 1))
    length = fmt.block[0]
    for start in range(0, 50, length):
        part = np.zeros((3, length, 4), np.float32)
        part[:, : min(length, 50 - start)] = x[:, start : start + length]
        assert_same_bits(along[:, start : start + length], round_to_blocks(part, fmt, axis=1)[:, : 50 - start])


def test_square_tiles_share_one_scale():
    x = np.random.default_rng(4).standard_normal((20, 40)).astype(np.float32)

    encoded = encode_blocks(x, "mxfp4@16x8")

    assert encoded.scales.shape == (2, 5)
    flat = round_to_blocks(np.ascontiguousarray(x[:16, :8]).reshape(1, -1), "mxfp4@128")
    assert_same_bits(encoded.decode()[:16, :8], np.asarray(flat).reshape(16, 8))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [0.1, 0.7, 300.0])
def test_what_is_constant_at_compile_time_is_rounded_as_what_is_not(spec, value):
    x = np.full((32, 64), value, np.float32)

    compiled = jax.jit(lambda: round_to_blocks(jnp.full((32, 64), value, jnp.float32), spec))()

    assert_same_bits(compiled, jax.jit(lambda x: round_to_blocks(x, spec))(x))


# Rules that round the scale up may find a smaller one the second time.
@pytest.mark.parametrize("spec", [spec for spec in SPECS if block_format(spec).rule in ("floor", "even")])
def test_rounding_twice_changes_nothing_where_the_scale_is_kept(spec):
    """A power-of-two scale is found again, unless all elements of a block went below the binade of its amax."""
    once = round_to_blocks(np.random.default_rng(6).standard_normal((32, 96)).astype(np.float32), spec)

    assert_same_bits(round_to_blocks(once, spec), once)


@pytest.mark.parametrize("spec", ["mxfp8", "mxfp4", "mxint8", "nvfp4"])
def test_non_finite_values_are_seen_in_their_block_only(spec):
    x = np.ones((3, 64), np.float32)
    x[0, 3], x[1, 40] = np.nan, -np.inf

    rounded = np.asarray(round_to_blocks(x, spec))
    saturated = np.asarray(round_to_blocks(x, spec, nonfinite="saturate"))

    length = block_format(spec).block[0]
    bad = np.zeros((3, 64), bool)
    bad[0, :length] = bad[1, 40 // length * length : (40 // length + 1) * length] = True
    np.testing.assert_array_equal(np.isnan(rounded), bad)
    np.testing.assert_array_equal(np.isnan(saturated).any(1), [True, False, False])
    assert saturated[1, 40] == saturated[1].min() <= -1
    assert (saturated[1, :40] == saturated[2, :40]).all()


@pytest.mark.parametrize("spec", ["mxfp8", "nvfp4"])
def test_gradient_is_straight_through_and_vmap_rounds_each(spec):
    x = jnp.asarray(np.random.default_rng(8).standard_normal((4, 2, 32)).astype(np.float32))

    gradient = jax.grad(lambda x: 3 * jnp.sum(round_to_blocks(x, spec)))(x)
    each = jax.vmap(partial(round_to_blocks, fmt=spec))(x)

    np.testing.assert_array_equal(gradient, jnp.full_like(x, 3))
    assert_same_bits(each, np.stack([round_to_blocks(row, spec) for row in x]))


def test_stochastic_rounding_of_elements_takes_a_neighbour_and_is_right_on_average():
    """Elements next to 2.3 are 2 and 3; the mean of n draws has a standard error of at most 1 / (2 sqrt(n))."""
    x = np.full((4096, 32), 2.3, np.float32)
    x[:, 0] = 4.0

    rounded = np.asarray(round_to_blocks(x, "mxfp4", rounding="stochastic", key=jax.random.key(0)))[:, 1:]

    assert set(np.unique(rounded)) == {2.0, 3.0}
    assert abs(rounded.mean() - 2.3) < 4 * 0.5 / np.sqrt(rounded.size)
    with pytest.raises(ValueError, match="needs randomness"):
        round_to_blocks(x, "mxfp4", rounding="stochastic")


@pytest.mark.parametrize(("n_bits", "centred"), [(3, False), (3, True), (8, False)])
@pytest.mark.parametrize("spec", [*MX, "mxint8:full,even", "bfp8@16"])
def test_few_random_bits_decide_about_elements_as_in_the_oracle(spec, n_bits, centred):
    """The scale is exact, so what is cut off an element is what hardware would cut off behind its scale."""
    fmt, rng = block_format(spec), np.random.default_rng(11)
    x = hard_blocks(12, fmt.block[-1], seed=11)
    bits = rng.integers(0, 1 << n_bits, x.shape, np.uint32)

    few = {"rounding": "stochastic", "bits": bits, "n_bits": n_bits, "centred": centred}
    rounded = round_to_blocks(x, spec, **few)
    stored = encode_blocks(x, spec, **few).decode()

    half = Fraction(int(centred), 2)
    chances = [[(int(word) + half) / (1 << n_bits) for word in row] for row in bits]
    exact = [
        block_oracle.round_block([Fraction(float(v)) for v in row], fmt, rounding="stochastic", chances=chance)
        for row, chance in zip(x, chances, strict=True)
    ]
    np.testing.assert_array_equal(rounded, np.float32([[float(value) for value in row] for row in exact]))
    assert_same_bits(stored, rounded)


def test_few_random_bits_decide_about_elements_of_nvfp4():
    """With an array amax of 448 * 6 and 6 in every other block all scales are 1, and elements round as they are."""
    rng = np.random.default_rng(12)
    x = rng.uniform(-6, 6, (64, 16)).astype(np.float32)
    x[:, 0], x[0, 0] = 6, 448 * 6
    bits = rng.integers(0, 16, x.shape, np.uint32)

    few = {"rounding": "stochastic", "bits": bits, "n_bits": 4, "centred": True}
    rounded = np.asarray(round_to_blocks(x, "nvfp4", **few))[1:]

    options = {**few, "bits": bits[1:], "overflow": "saturate"}
    np.testing.assert_array_equal(rounded, oracle.round_to(x[1:], "float4_e2m1fn", **options))


def test_scales_by_bits_are_those_of_the_oracle_for_every_exponent():
    for rule in RULES:
        fmt = with_rule("mxint8", rule)
        words = (np.arange(255, dtype=np.uint32)[:, None] << 23 | np.uint32([0, 1, 1 << 22, (1 << 23) - 1])).ravel()
        exponents = np.asarray(block_scales.scale_codes(jnp.asarray(words), fmt)).astype(int) - 127
        exact = [block_oracle.scale_exponent(Fraction(float(value)), fmt) for value in words.view(np.float32)]
        np.testing.assert_array_equal(exponents, exact)


@pytest.mark.parametrize("spec", [*MX, "mxint8:full", "bfp12"])
def test_the_fast_rounding_of_elements_equals_the_kernel(spec):
    """On everything a scale leaves: magnitudes below twice the power of two of the largest element, and zero."""
    fmt = block_format(spec).element
    words = np.asarray(hard_blocks(64, 32, seed=9)).view(np.uint32).ravel()
    words = words & 0x80FFFFFF | np.random.default_rng(9).integers(100, 128, words.size).astype(np.uint32) << 23
    words = words.view(np.float32) * np.float32(2.0 ** block_format(spec).max_exponent)
    words = jnp.asarray(np.concatenate([words, [0.0, -0.0], fmt.grid(), fmt.grid() * 0.75]).astype(np.float32))

    fast = block_scales.round_scaled(as_word(words), fmt)

    assert block_scales.has_fast_path(fmt)
    expected = round_to(words, fmt, overflow="saturate")
    assert_same_bits(np.asarray(fast).view(np.float32), expected)


@pytest.mark.parametrize(
    ("x", "spec", "options", "error", "message"),
    [
        (np.ones(4), "mxfp4", {}, TypeError, r"float16, bfloat16 or float32 arrays, got float64 \(4,\)"),
        (3.0, "mxfp4", {}, TypeError, "got float"),
        (
            np.ones(4, np.float32),
            "mxfp4",
            {"nonfinite": "drop"},
            ValueError,
            "nonfinite must be one of block, saturate",
        ),
        (np.ones(4, np.float32), "mxfp4", {"tensor_amax": 1.0}, ValueError, "tensor_amax is for formats with a scale"),
        (np.ones(4, np.float32), "mxfp4", {"rounding": "half"}, ValueError, "rounding must be one of"),
        (np.ones(4, np.float32), "nvfp4_2d", {}, ValueError, r"blocks of 16 x 16 along 2 axis\(es\)"),
        (np.ones(4, np.float32), "bf16", {}, ValueError, "unknown block format"),
    ],
)
def test_what_cannot_be_done_is_refused(x, spec, options, error, message):
    with pytest.raises(error, match=message):
        round_to_blocks(x, spec, **options)
    with pytest.raises(error, match=message):
        encode_blocks(x, spec, **options)


def test_empty_arrays_are_taken():
    for shape in ((0, 32), (3, 0)):
        x = np.zeros(shape, np.float32)
        assert round_to_blocks(x, "mxfp4").shape == encode_blocks(x, "nvfp4").decode().shape == shape


def test_a_block_array_is_a_pytree_that_jit_takes():
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    encoded = encode_blocks(x, "nvfp4")

    decoded = jax.jit(lambda array: array.decode())(encoded)

    assert_same_bits(decoded, encoded.decode())
    assert len(jax.tree.leaves(encoded)) == 3
    assert formats.format("nvfp4") == encoded.format
    assert as_word(encoded.tensor_scale).dtype == jnp.uint32


DIRECT = [*MX, "mxfp4:rceil", "mxfp6:ceil", "mxint8:full,even", "bfp8@16", "bfp16@16", "mxfp8@8x4"]
EDGES = [None, 0.0, np.nan, np.inf, 1e-40, -1e-45, 3e38, 2.0**-115, 2.0**100]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", DIRECT)
def test_rounding_without_dividing_by_scales_gives_what_is_stored(spec, dtype):
    """Arrays whose scales are all moderate take a shorter way on CPUs; one block of `edge` decides which."""
    values = np.random.default_rng(3).standard_normal((24, 96)) * 2.0 ** np.arange(-12, 12)[:, None]
    for edge in EDGES:
        with np.errstate(over="ignore"):
            x = values.copy() if edge is None else np.where(np.arange(24)[:, None] // 8 == 1, edge, values)
            x = jnp.asarray(x.astype(np.float32)).astype(dtype)
        assert_same_bits(round_to_blocks(x, spec), encode_blocks(x, spec).decode())


@pytest.mark.parametrize("spec", DIRECT)
def test_scales_at_the_bounds_of_the_shorter_way_round_as_stored(spec):
    least, most = block_scales.direct_exponents(block_format(spec).element)
    values = np.random.default_rng(4).uniform(-2, 2, (8, 96)).astype(np.float32)

    for exponent in range(least - 4, least + 12):
        x = values * np.float32(2) ** np.float32(exponent)
        assert_same_bits(round_to_blocks(x, spec), encode_blocks(x, spec).decode())
    for exponent in range(most - 8, min(most + 12, 126)):
        x = values * np.float32(2) ** np.float32(exponent)
        assert_same_bits(round_to_blocks(x, spec), encode_blocks(x, spec).decode())


def test_blocks_round_alike_under_vmap():
    x = np.random.default_rng(5).standard_normal((3, 4, 70)).astype(np.float32)
    x[1, 2] = 1e-44

    assert_same_bits(jax.vmap(lambda x: round_to_blocks(x, "mxfp4"))(x), round_to_blocks(x, "mxfp4"))


@pytest.mark.parametrize("spec", DIRECT)
def test_blocks_round_alike_on_each_device_of_a_shard_map(spec):
    """The branches that are chosen among varied over different mesh axes, which JAX refuses."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    along = jax.sharding.PartitionSpec("data")
    x = np.random.default_rng(6).standard_normal((4, 96)).astype(np.float32)
    x[1, :32] = 0

    sharded = jax.shard_map(lambda x: round_to_blocks(x, spec), mesh=mesh, in_specs=along, out_specs=along)

    assert_same_bits(jax.jit(sharded)(x), round_to_blocks(x, spec))


@pytest.mark.parametrize("spec", DIRECT)
def test_a_transposed_constant_keeps_its_order_in_a_loop(spec):
    """XLA of JAX 0.10 took its elements in the order of memory in the branches that are chosen among."""
    x = np.random.default_rng(7).standard_normal((16, 6)).astype(np.float32)

    axes = (0, 1) if len(block_format(spec).block) == 2 else 0

    def rounded(_):
        return round_to_blocks(jax.lax.transpose(jnp.asarray(x), (1, 0)), spec, axis=axes)

    found = jax.jit(lambda: jax.lax.map(rounded, jnp.arange(2)))()[1]

    assert_same_bits(found, round_to_blocks(x.T.copy(), spec, axis=axes))
