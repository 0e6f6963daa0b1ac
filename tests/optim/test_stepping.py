"""Around the optimizer: scaled gradients, what is kept back on a skip, which leaf was bad, applying updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from precision_lab.optim import (
    DynamicLossScale,
    StaticLossScale,
    apply_updates,
    commit,
    first_nonfinite,
    loss_scaling,
    no_usable_scale,
    require_usable_scale,
    value_and_scaled_grad,
)


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(3, dtype=jnp.float16)(x)
        return linen.BatchNorm(use_running_average=False, momentum=0.5)(x)


def test_check_42_commit_keeps_the_statistics_of_linen():
    """A float16 activation overflows; without commit its infinity is in the running mean for good."""
    model = Normed()
    x = jnp.full((4, 2), 60000.0)
    variables = model.init(jax.random.key(0), jnp.ones((4, 2)))
    kernel = jnp.full((2, 3), 2.0)
    params = variables["params"] | {"Dense_0": variables["params"]["Dense_0"] | {"kernel": kernel}}
    stats = variables["batch_stats"]
    tx = loss_scaling(optax.sgd(1e-3), DynamicLossScale(init=2.0))
    state = tx.init(params)

    def loss_fn(params, x):
        y, mutated = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(y**2), mutated["batch_stats"]

    @jax.jit
    def step(params, state, x):
        (_, new), grads = value_and_scaled_grad(loss_fn, has_aux=True)(state, params, x)
        updates, state = tx.update(grads, state, params)
        return new, commit(state, new, stats), optax.apply_updates(params, updates)

    raw, kept, after = step(params, state, x)
    _, moved, _ = step(params, state, jnp.asarray([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0], [1.0, 1.0]]))

    assert not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(raw))
    for new, old in zip(jax.tree.leaves(kept), jax.tree.leaves(stats), strict=True):
        np.testing.assert_array_equal(new, old)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(new, old)
    assert (moved["BatchNorm_0"]["mean"] != stats["BatchNorm_0"]["mean"]).all()


def test_check_42_commit_keeps_the_statistics_and_keys_of_nnx():
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    tx = loss_scaling(optax.sgd(1.0))
    old = {"stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), "key": jax.random.key(1), "step": 3}
    model(jnp.full((2, 2), jnp.inf))
    new = {"stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), "key": jax.random.key(2), "step": 4}
    params = jnp.ones(2)
    _, skipped = tx.update(jnp.full(2, jnp.inf), tx.init(params), params)
    _, applied = tx.update(jnp.ones(2), tx.init(params), params)

    kept, taken = commit(skipped, new, old), commit(applied, new, old)

    assert not bool(jnp.isfinite(new["stats"]["mean"]).all())
    np.testing.assert_array_equal(kept["stats"]["mean"], old["stats"]["mean"])
    np.testing.assert_array_equal(kept["stats"]["var"], old["stats"]["var"])
    assert (kept["key"] == old["key"], taken["key"] == new["key"]) == (True, True)
    assert (int(kept["step"]), int(taken["step"])) == (3, 4)
    assert not bool(jnp.isfinite(taken["stats"]["mean"]).any())


def test_commit_refuses_what_it_cannot_keep():
    tx = loss_scaling(optax.sgd(1.0))
    state = tx.init(jnp.ones(2))
    many = jax.vmap(tx.init)(jnp.ones((3, 2)))

    with pytest.raises(TypeError, match=r"'ema/w' was float32 \(2,\) and is bfloat16 \(2,\)\. Cast it before"):
        commit(state, {"ema": {"w": jnp.ones(2, jnp.bfloat16)}}, {"ema": {"w": jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"of \(3,\) models: call commit inside the vmap"):
        commit(many, jnp.ones((3, 3)), jnp.ones((3, 3)))


def test_value_and_scaled_grad_gives_the_loss_as_it_is_and_the_gradient_scaled():
    tx = loss_scaling(optax.sgd(1.0), StaticLossScale(2.0**12))
    params = {"w": jnp.float16(3.0), "n": jnp.arange(2)}
    state = tx.init(params)

    def loss_fn(params, x, *, power):
        return params["w"] * x**power, {"seen": x}

    (loss, aux), grads = value_and_scaled_grad(loss_fn, has_aux=True)(state, params, jnp.float16(2.0**-6), power=2)
    plain, _ = value_and_scaled_grad(lambda p: p["w"] ** 2)(state, params)

    assert (float(loss), loss.dtype) == (3.0 * 2.0**-12, jnp.float32)
    assert float(aux["seen"]) == 2.0**-6
    assert float(grads["w"]) == 2.0**12 * 2.0**-12
    assert grads["n"].dtype == jax.dtypes.float0
    assert float(plain) == 9.0
    assert int(jax.tree.leaves(tx.update(grads, state, params)[1].total)[0]) == 1


def test_check_44_the_first_bad_leaf_is_named():
    """Three NaN steps and a finite one; the first of the run counts, not what spread from it."""
    tx = loss_scaling(optax.adam(1e-3), DynamicLossScale(init=64.0))
    params = {"a": jnp.ones(2), "b": [jnp.arange(2), {"kernel": jnp.ones(2)}], "c": jnp.ones(2)}
    state = tx.init(params)

    def grads(a=1.0, kernel=1.0, c=1.0):
        none = np.zeros(2, jax.dtypes.float0)
        return {"a": jnp.full(2, a), "b": [none, {"kernel": jnp.array([1.0, kernel])}], "c": jnp.full(2, c)}

    assert first_nonfinite(state, params) is None
    names, counts = [], []
    nan = jnp.nan
    for g in (grads(kernel=nan, c=nan), grads(a=nan, c=nan), grads(c=nan), grads(), grads(c=jnp.inf)):
        updates, state = tx.update(g, state, params)
        params = apply_updates(params, updates)
        names.append(first_nonfinite(state, params))
        counts.append(int(state.consecutive_skips))

    assert names == ["b/1/kernel"] * 4 + ["c"]
    assert counts == [1, 2, 3, 0, 1]
    assert float(state.loss_scale) == 4.0
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


def test_replicas_name_the_same_bad_leaf():
    tx = loss_scaling(optax.sgd(1.0), axis_name="replica")
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3), "c": jnp.zeros(3)}
    grads = {"a": jnp.zeros(3), "b": jnp.array([0.0, 0.0, jnp.nan]), "c": jnp.array([jnp.inf, 0.0, 0.0])}
    states = jax.vmap(tx.init)(params)

    _, states = jax.vmap(tx.update, axis_name="replica")(grads, states, params)

    assert states.bad_leaf.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"of \(3,\) models; take one"):
        first_nonfinite(states, params)
    assert first_nonfinite(jax.tree.map(lambda x: x[0], states), params) == "b"


def test_a_scale_that_cannot_fall_further_is_reported():
    tx = loss_scaling(optax.sgd(1.0), DynamicLossScale(init=4.0, min=2.0))
    params = {"w": jnp.ones(1)}
    state = tx.init(params)
    seen = []
    for value in (jnp.inf, jnp.inf, jnp.inf, 1.0, jnp.inf):
        _, state = tx.update({"w": jnp.full(1, value)}, state, params)
        seen.append((bool(no_usable_scale(state)), int(state.floor_skips)))

    assert seen == [(False, 0), (True, 1), (True, 2), (False, 0), (True, 1)]
    require_usable_scale(state, params, patience=2)
    with pytest.raises(FloatingPointError, match=r"smallest one, 2, in 1 steps in a row, .* 'w'\. Lower"):
        require_usable_scale(state, params)


def test_apply_updates_does_what_optax_does_and_takes_every_leaf():
    history = {"amax": jnp.asarray([5.0, 7.0])}
    params = {
        "half": jnp.asarray([1.0, -0.0], jnp.bfloat16),
        "single": jnp.ones(2),
        "eighth": jnp.asarray([1.0, 2.0], jnp.float8_e4m3fn),
        "n": jnp.arange(2),
        "none": None,
        "_overwrite_with_gradient": history,
    }
    updates = {
        "half": jnp.asarray([2.0**-8 + 2.0**-20, -0.0]),
        "single": jnp.asarray([0.25, 0.5]),
        "eighth": jnp.asarray([0.0625, 0.25]),
        "n": np.zeros(2, jax.dtypes.float0),
        "none": None,
        "_overwrite_with_gradient": {"amax": jnp.asarray([9.0, 5.0])},
    }

    after = apply_updates(params, updates)

    both = {name: params[name] for name in ("half", "single")}
    stock = optax.apply_updates(both, {name: updates[name] for name in both})
    for name in both:
        np.testing.assert_array_equal(after[name].astype(jnp.float32), stock[name].astype(jnp.float32))
    assert after["half"].tolist() == [1 + 2.0**-7, 0.0]
    assert after["eighth"].astype(jnp.float32).tolist() == [1.0, 2.25]
    assert after["n"] is params["n"]
    assert after["_overwrite_with_gradient"]["amax"].tolist() == [9.0, 5.0]
