"""Split masters: a bfloat16 parameter and 16 more bits are the float32 master, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from precision_lab.formats import round_to
from precision_lab.optim import full_precision, loss_scaling, master_weights, sync
from precision_lab.optim.remainders import join, nearest_away, remainder

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, -1.1754942e-38, 9e-41, -9e-41, 3.4028235e38, -3.4028235e38, np.inf]


def masters():
    """Returns 2**20 normals, as many bit patterns drawn at random (no NaN), and the special numbers."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    normals = rng.standard_normal(2**20).astype(np.float32)
    return np.concatenate([normals, patterns[~np.isnan(patterns)], np.asarray(SPECIAL, np.float32)])


def as_bits(x):
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def is_tie(x):
    return (as_bits(x) & 0xFFFF) == 0x8000


def test_check_33_parameter_and_remainder_join_to_the_same_bits():
    x = masters()

    p = jax.jit(nearest_away)(jnp.asarray(x))
    rest = jax.jit(remainder)(jnp.asarray(x), p)
    joined = jax.jit(join)(p, rest)

    assert (p.dtype, rest.dtype) == (jnp.bfloat16, jnp.int16)
    np.testing.assert_array_equal(as_bits(joined), as_bits(x))


def test_check_33_the_state_takes_two_bytes_a_parameter():
    params = {"w": jnp.ones(1000, jnp.bfloat16)}

    sizes = [master_weights(optax.identity(), store=s).init(params).master["w"].nbytes for s in ("split", "full")]

    assert sizes == [2000, 4000]


def test_the_parameter_is_nearest_with_ties_away_from_zero():
    """Against formats' own rounding; and it differs from the nearest-even cast in even ties only."""
    x = masters()
    ties = np.random.default_rng(1).integers(0, 0x7F80, 2**12).astype(np.uint32) << 16 | np.uint32(0x8000)
    x = np.concatenate([x, ties.view(np.float32), -ties.view(np.float32)])

    p = nearest_away(jnp.asarray(x))

    away = round_to(jnp.asarray(x), "bfloat16", rounding="nearest_away").astype(jnp.bfloat16)
    np.testing.assert_array_equal(as_bits(p), as_bits(away))
    differs = as_bits(p) != as_bits(round_to(jnp.asarray(x), "bfloat16").astype(jnp.bfloat16))
    even = (as_bits(x) >> 16) % 2 == 0
    np.testing.assert_array_equal(differs, is_tie(x) & even)


def test_no_16_bits_can_keep_the_nearest_even_cast():
    """65537 float32 numbers round to the even bfloat16 number 1.0, so one of them has to go."""
    around = np.arange(0x3F800000 - 0x10000, 0x3F800000 + 0x10000, dtype=np.uint32).view(np.float32)

    cast = round_to(jnp.asarray(around), "bfloat16")

    assert int((cast == 1.0).sum()) == 65537


def test_nan_stays_nan_whatever_its_payload():
    patterns = np.asarray([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF80ABCD], np.uint32)
    nans = jnp.asarray(patterns.view(np.float32))

    p = nearest_away(nans)

    assert bool(jnp.isnan(p).all())
    assert bool(jnp.isnan(join(p, remainder(nans, p))).all())


def test_the_sign_of_a_zero_parameter_does_not_matter():
    tiny = jnp.asarray([0.0, -0.0, 1e-45, -1e-45], jnp.float32)
    rest = remainder(tiny, nearest_away(tiny))

    for zero in (0.0, -0.0):
        joined = join(jnp.full(4, zero, jnp.bfloat16), rest)

        np.testing.assert_array_equal(as_bits(joined), as_bits(tiny))


def test_split_masters_are_the_full_ones_over_a_training_run():
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.standard_normal(256), jnp.bfloat16), "b": jnp.zeros(3)}
    grads = {"w": rng.standard_normal((50, 256)).astype(np.float32), "b": rng.standard_normal((50, 3))}
    grads["w"][[4, 20], 0] = np.inf

    def trained(store):
        tx = loss_scaling(master_weights(optax.adamw(1e-2), store=store))

        def step(carry, g):
            params, state = carry
            g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) * state.loss_scale, g)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), full_precision(params, state)["w"]

        return jax.jit(lambda c: jax.lax.scan(step, c, grads))((params, tx.init(params)))

    (split, split_state), _ = trained("split")
    (full, full_state), _ = trained("full")

    assert int(split_state.skipped) == 2
    assert split_state.inner.master["w"].dtype == jnp.int16
    masters = [full_precision(split, split_state), full_precision(full, full_state)]
    np.testing.assert_array_equal(as_bits(masters[0]["w"]), as_bits(masters[1]["w"]))
    np.testing.assert_array_equal(as_bits(masters[0]["b"]), as_bits(masters[1]["b"]))
    np.testing.assert_array_equal(as_bits(split["w"]), as_bits(nearest_away(masters[1]["w"])))
    assert sync(split, split_state)["w"] is split["w"]


def test_split_starts_from_the_originals():
    """To the last bit, but for even ties: a cast rounds 1 + 2**-8 to 1, and the master starts one ulp lower."""
    original = np.random.default_rng(3).standard_normal(2**12).astype(np.float32)
    original[0] = 1 + 2.0**-8
    tx = master_weights(optax.sgd(1.0), param_dtype=jnp.bfloat16, store="split")

    state = tx.init(jnp.asarray(original))
    start = full_precision(jnp.asarray(original).astype(jnp.bfloat16), state)

    assert float(start[0]) == 1 + 2.0**-8 - 2.0**-23
    np.testing.assert_array_equal(as_bits(start)[1:], as_bits(original)[1:])


def test_split_is_for_bfloat16_and_says_so():
    split = master_weights(optax.sgd(1.0), store="split")

    with pytest.raises(TypeError, match=r"'a/w' is float16, and store='split'.*Use store='full'"):
        split.init({"a": {"w": jnp.ones(2, jnp.float16)}})
    with pytest.raises(TypeError, match="is float16, and store='split'"):
        master_weights(optax.sgd(1.0), param_dtype="float16", store="split").init(jnp.ones(2))
    with pytest.raises(ValueError, match="store must be one of 'full', 'split', got 'half'"):
        master_weights(optax.sgd(1.0), store="half")
    state = split.init({"w": jnp.ones(2, jnp.bfloat16)})
    with pytest.raises(TypeError, match=r"parameter 'w' is float32.*Cast the parameters"):
        split.update({"w": jnp.ones(2)}, state, {"w": jnp.ones(2)})
