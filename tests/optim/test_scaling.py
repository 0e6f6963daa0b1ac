"""Loss scaling: the scale's trajectory, skipped steps, what the inner transformation sees."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest

from precision_lab.optim import (
    DynamicLossScale,
    NoLossScale,
    StaticLossScale,
    current_loss_scale,
    loss_scaling,
    master_weights,
    nearest_rounding,
    scale_loss,
    skipped_steps,
    step_was_applied,
)

ROOT = Path(__file__).parents[2]
GOOD, BAD = 1.0, np.inf


def scales_after(tx, events, *, jit=True):
    """Returns the scale after each gradient in `events`."""
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    trajectory = []
    for event in events:
        _, state = update({"w": jnp.full(2, event)}, state, params)
        trajectory.append(float(current_loss_scale(state)))
    return trajectory


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("jit", [True, False])
def test_scale_follows_the_worked_trajectory(jit):
    """Check 16."""
    tx = loss_scaling(optax.sgd(1.0), DynamicLossScale(init=8.0, interval=3))
    events = [GOOD] * 4 + [BAD] + [GOOD] * 3 + [BAD] * 5

    trajectory = scales_after(tx, events, jit=jit)

    assert trajectory == [8, 8, 16, 16, 8, 8, 8, 16, 8, 4, 2, 1, 1]


def by_the_apex_kernel(events, scale, interval, hysteresis):
    """Returns scales and growth counts after each event, as the kernel update_scale_hysteresis goes, line by line."""
    growth, left, rows = 0, hysteresis, []
    for finite in events:
        if not finite:
            left -= 1
            growth = 0
            if left <= 0:
                scale *= 0.5
        else:
            growth += 1
            if growth == interval:
                scale, growth = scale * 2, 0
            left = hysteresis
        rows.append((scale, growth))
    return rows


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_hysteresis_is_that_of_the_apex_kernel(hysteresis):
    events = np.random.default_rng(hysteresis).random(200) < 0.6
    config = DynamicLossScale(2.0**40, interval=3, hysteresis=hysteresis, min=2.0**-100, max=2.0**126)
    tx = loss_scaling(optax.identity(), config)
    grads = jnp.where(events, 1.0, jnp.inf)

    def step(state, g):
        _, state = tx.update(g, state)
        return state, (state.loss_scale, state.good_steps)

    _, (scales, counts) = jax.lax.scan(step, tx.init(grads[0]), grads)

    expected = by_the_apex_kernel(events, 2.0**40, 3, hysteresis)
    assert list(zip(scales.tolist(), counts.tolist(), strict=True)) == expected


def test_hysteresis_of_two_forgives_single_overflows():
    """Worked by hand: alone, alone, then three in a row, of which the second and third lower the scale."""
    tx = loss_scaling(optax.sgd(1.0), DynamicLossScale(init=64.0, hysteresis=2))

    assert scales_after(tx, [BAD, GOOD, BAD, GOOD, BAD, BAD, BAD, GOOD]) == [64, 64, 64, 64, 64, 32, 16, 16]


def test_scale_grows_on_exactly_the_last_step_of_the_interval():
    """Check 17."""
    tx = loss_scaling(optax.identity())
    grads = {"w": jnp.ones(1)}

    def step(state, _):
        _, state = tx.update(grads, state)
        return state, state.loss_scale

    _, scales = jax.lax.scan(step, tx.init(grads), None, length=4001)

    grown = np.flatnonzero(np.diff(np.concatenate([[65536.0], scales]))) + 1
    assert grown.tolist() == [2000, 4000]


def test_scale_stops_at_max_and_is_never_infinite():
    """Check 18."""
    tx = loss_scaling(optax.identity(), DynamicLossScale(init=2.0**23, interval=1))
    huge = loss_scaling(optax.identity(), DynamicLossScale(init=2.0**126, interval=1, max=2.0**126))

    assert scales_after(tx, [GOOD] * 3) == [2.0**24] * 3
    assert scales_after(huge, [GOOD] * 3) == [2.0**126] * 3


@pytest.mark.parametrize("through", ["eager", "jit", "tree.map", "flatten"])
def test_scale_stops_at_min_however_the_state_travelled(through):
    """Check 18."""
    tx = loss_scaling(optax.identity(), DynamicLossScale(init=8.0, min=4.0))
    update = jax.jit(tx.update) if through == "jit" else tx.update
    grads = {"w": jnp.array([jnp.nan])}
    state = tx.init(grads)

    scales = []
    for _ in range(3):
        _, state = update(grads, state)
        if through == "tree.map":
            state = jax.tree.map(lambda x: x, state)
        elif through == "flatten":
            leaves, treedef = jax.tree.flatten(state)
            state = jax.tree.unflatten(treedef, [np.asarray(leaf) for leaf in leaves])
        scales.append(float(state.loss_scale))

    assert scales == [4.0, 4.0, 4.0]


def test_a_scale_below_one_is_checked_after_the_division():
    """1e38 over 2**-10 is infinite in float32 although the scaled gradient was not."""
    tx = loss_scaling(optax.sgd(1.0), DynamicLossScale(init=2.0**-10, min=2.0**-20))
    state = tx.init({"w": jnp.zeros(1)})

    updates, state = tx.update({"w": jnp.array([1e38])}, state)

    assert float(updates["w"][0]) == 0.0
    assert float(state.loss_scale) == 2.0**-11


def test_scaling_rescues_a_gradient_that_float16_cannot_hold():
    """Check 19."""

    def grad_through_float16(scale):
        tx = loss_scaling(optax.identity(), StaticLossScale(scale))
        state = tx.init(jnp.float32(0))

        def loss(w):
            half = w.astype(jnp.float16) * jnp.float16(1e-4) * jnp.float16(1e-4)
            return scale_loss(half.astype(jnp.float32), state)

        updates, _ = tx.update(jax.grad(loss)(jnp.float32(1.0)), state)
        return float(updates)

    assert grad_through_float16(1.0) == 0.0
    assert grad_through_float16(2.0**15) == pytest.approx(1e-8, rel=1e-3)


def test_overflow_skips_the_step_and_leaves_the_inner_state_alone():
    """Check 20."""
    tx = loss_scaling(optax.adam(1e-3), DynamicLossScale(init=32768.0))
    params = {"w": jnp.arange(1.0, 4.0)}
    _, before = tx.update({"w": jnp.array([1.0, -2.0, 3.0]) * 32768}, tx.init(params), params)

    updates, after = jax.jit(tx.update)({"w": jnp.array([1.0, jnp.inf, jnp.nan])}, before, params)

    assert_same_bits(updates, {"w": -np.zeros(3, np.float32)})
    assert_same_bits(after.inner, before.inner)
    assert int(optax.tree_utils.tree_get(after, "count")) == 1
    assert float(after.loss_scale) == 16384.0
    assert (int(after.skipped), int(after.total), bool(after.last_finite)) == (1, 2, False)
    assert not step_was_applied(after)
    assert int(skipped_steps(after)) == 1


def test_nan_never_comes_back():
    """Check 44."""
    tx = loss_scaling(optax.adam(1e-3), DynamicLossScale(init=64.0))
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    counts = []
    for value in (jnp.nan, jnp.nan, jnp.nan, 64.0):
        updates, state = tx.update({"w": jnp.array([value, 64.0])}, state, params)
        params = optax.apply_updates(params, updates)
        counts.append(int(state.consecutive_skips))

    assert counts == [1, 2, 3, 0]
    assert float(state.loss_scale) == 8.0
    assert bool(jnp.isfinite(params["w"]).all())


def test_clipping_sees_unscaled_gradients():
    """Check 21."""
    tx = loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), StaticLossScale(1024.0))
    params = jnp.zeros(2)

    updates, _ = tx.update(jnp.array([3.0, 4.0]) * 1024, tx.init(params), params)

    np.testing.assert_allclose(updates, [-0.6, -0.8], atol=1e-6)


@pytest.mark.parametrize("power", [0, 4, 15, 24])
def test_static_scale_of_a_power_of_two_changes_no_bit(power):
    """Check 22."""
    tx = loss_scaling(optax.identity(), StaticLossScale(2.0**power))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
    state = tx.init(x[0])

    def loss(w):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    w = jnp.linspace(-1.0, 1.0, 8)
    scaled = jax.jit(jax.grad(lambda w: scale_loss(loss(w), state)))(w)
    updates, _ = tx.update(scaled, state)

    assert_same_bits(updates, jax.jit(jax.grad(loss))(w))


def test_gradients_reach_the_inner_transformation_in_float32():
    seen = {}

    def spy(updates, state, params=None, *, temperature, **extra_args):
        seen.update(dtype=updates["w"].dtype, params=params, temperature=temperature, extra=extra_args)
        return updates, state

    tx = loss_scaling(optax.GradientTransformationExtraArgs(lambda p: (), spy), StaticLossScale(4.0))
    params = {"w": jnp.ones(2, jnp.float16)}

    updates, _ = tx.update({"w": jnp.full(2, 8, jnp.float16)}, tx.init(params), params=params, temperature=3, value=1)

    assert seen["dtype"] == jnp.float32
    assert seen["params"]["w"].dtype == jnp.float16
    assert seen["temperature"] == 3
    assert seen["extra"] == {"value": 1}
    np.testing.assert_array_equal(updates["w"], [2.0, 2.0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_every_floating_dtype_is_unscaled(dtype):
    tx = loss_scaling(optax.identity(), StaticLossScale(8.0))
    grads = jnp.array([8.0, -16.0], dtype)

    updates, state = jax.jit(tx.update)(grads, tx.init(grads))

    assert updates.dtype == jnp.promote_types(dtype, jnp.float32)
    np.testing.assert_array_equal(updates, [1.0, -2.0])
    assert bool(state.last_finite)


def test_leaves_that_are_no_gradients_come_back_untouched_and_uncounted():
    """Check 28."""
    params = {"w": jnp.ones(2), "n": jnp.arange(3), "key": jax.random.key(0), "none": None, "mask": optax.MaskedNode()}
    zero_tangent = np.zeros(3, jax.dtypes.float0)
    grads = {"w": jnp.ones(2), "n": zero_tangent, "key": np.zeros((), jax.dtypes.float0), "none": None}
    grads["mask"] = optax.MaskedNode()
    tx = loss_scaling(optax.adam(1.0), StaticLossScale(2.0))

    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    as_integers, _ = tx.update(grads | {"n": jnp.array([7, 8, 9])}, state, params)

    assert updates["n"] is zero_tangent
    assert updates["none"] is None
    assert updates["mask"] == optax.MaskedNode()
    np.testing.assert_allclose(updates["w"], -1.0, rtol=1e-5)
    np.testing.assert_array_equal(as_integers["n"], [7, 8, 9])
    assert bool(state.last_finite)


def test_float8_scales_are_neither_unscaled_nor_checked_nor_clipped():
    """Check 28. The "gradients" of Flax's _overwrite_with_gradient are new values, infinite ones included."""
    meta = {"_overwrite_with_gradient": {"dense": {"input_scale": jnp.ones(1), "history": jnp.full(4, 1e6)}}}
    params = {"params": {"w": jnp.zeros(2)}} | meta
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))
    grads = {"params": {"w": jnp.array([3.0, 4.0]) * 2}}
    new = {"_overwrite_with_gradient": {"dense": {"input_scale": jnp.full(1, 7.0), "history": jnp.full(4, jnp.inf)}}}
    seen = []

    def spy(updates, state, params=None):
        seen.append((updates, params))
        return updates, state

    tx = loss_scaling(optax.chain(optax.GradientTransformation(lambda p: (), spy), clipped), StaticLossScale(2.0))

    updates, state = tx.update(grads | new, tx.init(params), params)

    assert (
        updates["_overwrite_with_gradient"]["dense"]["history"] is new["_overwrite_with_gradient"]["dense"]["history"]
    )
    assert updates["_overwrite_with_gradient"]["dense"]["input_scale"].tolist() == [7.0]
    assert [x.tolist() for x in jax.tree.leaves(seen[0][0])] == [[3.0, 4.0]]
    assert [x.tolist() for x in jax.tree.leaves(seen[0][1])] == [[0.0, 0.0]]
    assert bool(state.last_finite)


def test_a_branch_and_a_selection_give_the_same_bits():
    """Outside vmap a step is skipped by branching, under it by selecting; dyadic numbers round nowhere."""
    tx = loss_scaling(optax.trace(0.5), DynamicLossScale(init=4.0))
    params = {"w": jnp.asarray([1.0, -0.0])}

    def run(update, state, lift):
        rows = []
        for value in (4.0, jnp.inf, 8.0, jnp.nan):
            grads = {"w": jnp.asarray([value, 4.0])}
            updates, state = update(lift(grads), state, lift(params))
            rows.append((updates, state))
        return rows

    eager = run(tx.update, tx.init(params), lambda x: x)
    jitted = run(jax.jit(tx.update), tx.init(params), lambda x: x)
    mapped = run(
        jax.vmap(tx.update), jax.vmap(tx.init)({"w": params["w"][None]}), lambda x: jax.tree.map(lambda y: y[None], x)
    )

    assert_same_bits(eager, jitted)
    assert_same_bits(jax.tree.map(lambda x: x[0], mapped), jitted)
    assert "cond" in str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


def test_without_a_loss_scale_every_step_is_applied():
    tx = loss_scaling(optax.sgd(1.0), NoLossScale())
    state = tx.init({"w": jnp.zeros(1)})

    updates, state = tx.update({"w": jnp.array([jnp.inf])}, state)

    assert float(updates["w"][0]) == -np.inf
    assert float(state.loss_scale) == 1.0
    assert not state.last_finite
    assert int(state.skipped) == 0
    assert step_was_applied(state)


def test_static_scale_skips_but_does_not_change():
    tx = loss_scaling(optax.sgd(1.0), StaticLossScale(1024.0))

    assert scales_after(tx, [BAD, GOOD, BAD]) == [1024.0] * 3


def test_around_multi_steps_a_bad_micro_step_is_dropped():
    """Check 23."""
    tx = loss_scaling(optax.MultiSteps(optax.sgd(1.0), 4), DynamicLossScale(init=8.0))
    params = jnp.zeros(())
    state = tx.init(params)
    rows = []
    for value in (1.0, 2.0, jnp.inf, 3.0, 4.0):
        updates, state = jax.jit(tx.update)(value * state.loss_scale, state, params)
        params = optax.apply_updates(params, updates)
        rows.append((float(params), int(state.inner.mini_step), float(state.loss_scale)))

    assert rows == [(0, 1, 8), (0, 2, 8), (0, 2, 4), (0, 3, 4), (-2.5, 0, 4)]


def test_full_stack_keeps_the_schedule_on_applied_steps_only():
    """Check 25. Accumulation over two micro-steps, Adam with a linear schedule, an overflow at micro-step 4."""
    rates = []

    def record(count):
        return jnp.maximum(0.01 * (1 - count / 10), 0)

    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(record))
    tx = loss_scaling(optax.MultiSteps(master_weights(inner), 2), DynamicLossScale(init=8.0))
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)
    gradient_steps = []
    for micro_step in range(1, 10):
        grads = {"w": jnp.full(2, jnp.inf if micro_step == 4 else 8.0)}
        _, state = tx.update(grads, state, params)
        gradient_steps.append(int(state.inner.gradient_step))
        rates.append(round(float(state.inner.inner_opt_state.inner[1].hyperparams["learning_rate"]), 6))

    assert gradient_steps == [0, 1, 1, 1, 2, 2, 3, 3, 4]
    assert rates == [0.01, 0.01, 0.01, 0.01, 0.009, 0.009, 0.008, 0.008, 0.007]


def test_members_of_a_vmapped_ensemble_keep_their_own_scales():
    """Check 27."""
    tx = loss_scaling(optax.sgd(1.0), DynamicLossScale(init=4.0))
    params = jnp.zeros(3)
    state = jax.vmap(tx.init)(params)

    updates, state = jax.vmap(tx.update)(jnp.array([4.0, jnp.inf, 8.0]), state, params)

    np.testing.assert_array_equal(updates, [-1.0, 0.0, -2.0])
    np.testing.assert_array_equal(state.loss_scale, [4.0, 2.0, 4.0])


def test_members_of_a_named_axis_skip_together():
    """Check 26."""
    tx = loss_scaling(optax.sgd(1.0), DynamicLossScale(init=4.0), axis_name="replica")
    params = jnp.zeros(3)
    state = jax.vmap(tx.init)(params)

    updates, state = jax.vmap(tx.update, axis_name="replica")(jnp.array([4.0, jnp.inf, 8.0]), state, params)

    np.testing.assert_array_equal(updates, [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(state.loss_scale, [2.0, 2.0, 2.0])


def test_state_fits_a_scan_carry_and_keeps_its_dtypes():
    """Check 38."""
    tx = loss_scaling(optax.inject_hyperparams(optax.adamw)(1e-3), DynamicLossScale())
    params = {"w": jnp.ones(3)}
    state = tx.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, final), _ = jax.lax.scan(step, (params, state), None, length=5)

    assert [x.dtype for x in jax.tree.leaves(final)] == [x.dtype for x in jax.tree.leaves(state)]
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    assert int(final.total) == 5


def test_donated_state_is_reused_without_a_warning(recwarn):
    """Check 38."""
    tx = loss_scaling(optax.adam(1e-3))
    params = {"w": jnp.ones((64, 64))}
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=1)

    for _ in range(3):
        _, state = update({"w": jnp.ones((64, 64))}, state, params)

    assert not [w for w in recwarn if "donated" in str(w.message)]


def test_works_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        tx = loss_scaling(nearest_rounding(optax.sgd(jnp.float32(1.0))), DynamicLossScale())
        params = {"w": jnp.ones(3, jnp.float16)}
        state = tx.init(params)
        loss = scale_loss(jnp.float16(0.5), state)

        updates, state = jax.jit(tx.update)({"w": jnp.ones(3, jnp.float16)}, state, params)

    assert loss.dtype == jnp.float32
    assert float(loss) == 32768.0
    assert updates["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("theirs", "trajectory"),
    [
        (jmp.NoOpLossScale(), [1, 1, 1, 1]),
        (jmp.StaticLossScale(jnp.float32(1024)), [1024] * 4),
        (jmp.DynamicLossScale(jnp.float32(16), period=2, min_loss_scale=jnp.float32(8)), [16, 32, 16, 8]),
    ],
    ids=["none", "static", "dynamic"],
)
def test_loss_scales_of_jmp_are_accepted(theirs, trajectory):
    tx = loss_scaling(optax.identity(), theirs)

    assert scales_after(tx, [GOOD, GOOD, BAD, BAD]) == trajectory


@pytest.mark.parametrize("scale", [2.0**126, 2.0**-126, 1024.0, 3.0, 1000.0, 0.75])
def test_any_scale_is_undone(scale):
    """To the last bit for powers of two, else within 1.5 ulp; subnormal quotients are left out, XLA may flush them."""
    tx = loss_scaling(optax.identity(), StaticLossScale(scale))
    random = np.random.default_rng(0)
    grads = (random.standard_normal(1000) * 2.0 ** random.integers(-60, 60, 1000)).astype(np.float32)
    exact = grads.astype(np.float64) / scale
    usable = (abs(exact) <= np.finfo(np.float32).max) & (abs(exact) >= 2.0**-126)
    grads, exact = grads[usable], exact[usable].astype(np.float32)

    updates, _ = jax.jit(tx.update)(jnp.asarray(grads), tx.init(jnp.asarray(grads)))

    assert usable.sum() > 300
    tolerance = 0 if np.frexp(scale)[0] == 0.5 else 1.5
    assert (abs(updates - exact) <= tolerance * np.spacing(abs(exact))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float64_gradients_stay_float64(dtype):
    with jax.enable_x64(True):
        tx = loss_scaling(optax.identity(), StaticLossScale(1024.0))
        grads = jnp.array([1e-3, 1.0], dtype)

        updates, state = tx.update(grads, tx.init(grads))

        assert updates.dtype == dtype
        np.testing.assert_array_equal(updates, np.asarray(grads) / np.asarray(1024, dtype))
        assert state.loss_scale.dtype == jnp.float32


SHARDED = """
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from precision_lab.optim import DynamicLossScale, loss_scaling

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
grads = jnp.array([4.0, 4.0, jnp.inf, 4.0])

def scaler(axis_name):
    return loss_scaling(optax.sgd(1.0), DynamicLossScale(init=4.0), axis_name=axis_name)

def shards(axis_name):
    def local(g):
        updates, state = scaler(axis_name).update(g[0], scaler(axis_name).init(g[0]), g[0])
        return updates[None], state.loss_scale[None]
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(grads)

def spmd():
    placed = jax.device_put(grads, NamedSharding(mesh, P("data")))
    updates, state = jax.jit(scaler(None).update)(placed, scaler(None).init(placed), placed)
    return updates, state.loss_scale

for updates, scale in (shards("data"), shards(None), spmd()):
    print(updates.tolist(), scale.tolist())
"""


@pytest.mark.slow
def test_devices_skip_together_where_they_share_parameters():
    """Check 26. Four devices, one of which overflows. Under shard_map that takes axis_name; under SPMD nothing."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", SHARDED]

    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)

    assert done.stdout.splitlines() == [
        "[-0.0, -0.0, -0.0, -0.0] [2.0, 2.0, 2.0, 2.0]",
        "[-1.0, -1.0, -0.0, -1.0] [4.0, 4.0, 2.0, 4.0]",
        "[-0.0, -0.0, -0.0, -0.0] 2.0",
    ], done.stderr


@pytest.mark.parametrize("jit", [True, False])
def test_a_skipped_step_keeps_the_sign_of_a_zero_parameter(jit):
    params = {"w": jnp.asarray([-0.0, 0.0, 1.0, -1.0])}
    tx = loss_scaling(optax.adam(1.0), DynamicLossScale())

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), updates

    after, updates = (jax.jit(step) if jit else step)({"w": jnp.full(4, BAD)}, tx.init(params), params)

    assert_same_bits(after, params)
    assert (np.asarray(updates["w"]) == 0).all()
