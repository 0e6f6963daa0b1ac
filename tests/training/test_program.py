"""The compiled part: pairing, sharing, what a skipped step leaves alone, and metrics checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from precision_lab import data
from precision_lab.data import DigitsConfig
from precision_lab.training.numbers import hyper
from precision_lab.training.optimizer import build_optimizer
from precision_lab.training.program import check_program, program_for
from tests.training.runs import HALF, config

SPEC = DigitsConfig().spec()
BFLOAT = HALF.replace("float16", "bfloat16")


def prepared(**changes):
    """Returns (program, state, batches, hyper) of a small run."""
    one = config(**changes)
    program = program_for(one, SPEC)
    numbers = hyper(one)
    return program, program.init(one.seed, numbers), data.batches(data.load(one.data), one.data, one.seed), numbers


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("policy", ["bfloat16_mixed", HALF, BFLOAT])
def test_paired_runs_start_from_the_same_bits(policy):
    _, plain, _, _ = prepared()
    _, other, _, _ = prepared(policy=policy)

    assert_same_bits(other.params, jax.tree.map(lambda p, o: p.astype(o.dtype), plain.params, other.params))


def test_masters_start_from_the_full_precision_initialisation():
    _, plain, _, _ = prepared()
    _, half, _, _ = prepared(policy=HALF, master_weights=True)

    assert_same_bits(half.opt_state.inner.master, plain.params)
    assert {p.dtype for p in jax.tree.leaves(half.params)} == {np.dtype("float16")}


def test_runs_that_differ_in_numbers_only_share_one_compiled_step():
    program, state, batches, numbers = prepared(seed=0)
    program.step(state, batches[0], numbers)
    compiled = program.step._cache_size()

    sgd = {"kind": "sgd", "momentum": 0.9}
    variants = [{"seed": 5}, {"optim": {**sgd, "lr": 0.1}}, {"train": {"loss_shift": 7, "steps": 99, "log_every": 1}}]
    for changes in variants:
        other, state, batches, numbers = prepared(**changes)
        other.step(state, batches[0], numbers)
        assert other.step is program.step

    assert program.step._cache_size() == compiled


def test_another_policy_does_not_share_it():
    assert prepared()[0].step is not prepared(policy="bfloat16_mixed")[0].step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": HALF, "master_weights": True, "loss_scale": {"kind": "dynamic"}},
        {"policy": BFLOAT, "optim": {"kind": "adamw", "lr": 1e-3, "schedule": {"kind": "cosine"}, "clip_norm": 1.0}},
        {"model": {"kind": "convnet", "channels": [4, 4], "norm": "batch"}},
        {"policy": BFLOAT, "update": "stochastic"},
        {"policy": HALF, "update": "kahan"},
    ],
    ids=["float32", "master", "adamw", "batch_norm", "stochastic", "kahan"],
)
def test_a_step_keeps_every_shape_and_dtype(changes):
    program, state, batches, numbers = prepared(**changes)
    before = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]

    after, _ = program.step(state, batches[0], numbers)

    assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(after)] == before
    assert {(x.shape, x.dtype) for x in jax.tree.leaves(program.state_shapes)} == {(s, d) for s, d, _ in before}


def loss_written_out(params, batch):
    """Returns the loss of the small model, in plain JAX."""
    hidden = jax.nn.relu(batch["inputs"].reshape(32, -1) @ params["layers"][0]["kernel"] + params["layers"][0]["bias"])
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(32), batch["targets"]])


gradients_written_out = jax.jit(jax.value_and_grad(loss_written_out))


@pytest.mark.parametrize(
    ("optim", "plain"),
    [
        ({"kind": "sgd", "lr": 0.05}, optax.sgd(0.05)),
        ({"kind": "sgd", "lr": 0.05, "momentum": 0.9}, optax.sgd(0.05, momentum=0.9)),
        (
            {"kind": "sgd", "lr": 0.05, "momentum": 0.8, "nesterov": True},
            optax.sgd(0.05, momentum=0.8, nesterov=True),
        ),
        ({"kind": "adam", "lr": 0.01, "b1": 0.5, "b2": 0.7, "eps": 0.01}, optax.adam(0.01, b1=0.5, b2=0.7, eps=0.01)),
        (
            {"kind": "adamw", "lr": 0.01, "b1": 0.5, "b2": 0.7, "eps": 0.01, "weight_decay": 0.3},
            optax.adamw(0.01, b1=0.5, b2=0.7, eps=0.01, weight_decay=0.3),
        ),
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adamw"],
)
def test_three_steps_are_those_of_optax_written_out(optim, plain):
    program, state, batches, numbers = prepared(optim=optim)
    params = jax.tree.map(np.array, state.params)
    plain_state = plain.init(params)

    @jax.jit
    def moved(grads, plain_state, params):
        updates, plain_state = plain.update(grads, plain_state, params)
        return plain_state, optax.apply_updates(params, updates), optax.tree.norm(grads)

    for step in range(3):
        loss, grads = gradients_written_out(params, batches[step])
        plain_state, params, norm = moved(grads, plain_state, params)
        state, metrics = program.step(state, batches[step], numbers)

        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)

    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("scale", [{"kind": "none"}, *({"kind": "static", "scale": 2.0**k} for k in (-32, 10, 80))])
@pytest.mark.parametrize("shift", [0, 32])
def test_gradient_norm_is_that_of_the_loss_itself(scale, shift):
    program, state, batches, numbers = prepared(loss_scale=scale, train={"loss_shift": shift})
    plain, start, _, plain_numbers = prepared()

    _, metrics = program.step(state, batches[0], numbers)
    _, expected = plain.step(start, batches[0], plain_numbers)

    assert float(metrics["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)


def test_gradients_that_underflow_are_counted():
    """Shifted by 30 binades every float16 gradient is zero: nothing moves."""
    half = {"policy": HALF, "master_weights": True}
    program, state, batches, numbers = prepared(train={"loss_shift": 30}, **half)
    scaled, other, _, other_numbers = prepared(
        train={"loss_shift": 30}, loss_scale={"kind": "static", "scale": 2.0**30}, **half
    )

    _, metrics = program.step(state, batches[0], numbers)
    _, rescued = scaled.step(other, batches[0], other_numbers)

    assert float(metrics["zero_grad_fraction"]) == 1.0
    assert float(metrics["unchanged_fraction"]) == 1.0
    assert float(rescued["zero_grad_fraction"]) < 0.5
    assert float(rescued["unchanged_fraction"]) < 1.0


def test_unchanged_fraction_counts_parameters_below_half_an_ulp():
    """With a learning rate of 1e-9 no float16 parameter moves but those that start at zero, the biases."""
    optim = {"kind": "sgd", "lr": 1e-9}
    program, state, batches, numbers = prepared(policy=HALF, optim=optim)
    weights = sum(p.size for p in jax.tree.leaves(state.params) if p.ndim == 2)
    everything = sum(p.size for p in jax.tree.leaves(state.params))

    _, metrics = program.step(state, batches[0], numbers)

    assert float(metrics["unchanged_fraction"]) >= weights / everything - 1e-6


def kernels(**changes):
    """Returns float64 kernels, one array, after 200 steps that are all below half an ulp, and before them."""
    program, state, batches, numbers = prepared(optim={"kind": "sgd", "lr": 1e-4}, **changes)

    def of(state):
        return np.concatenate([np.asarray(p, np.float64).ravel() for p in jax.tree.leaves(state.params) if p.ndim == 2])

    before = of(state)
    for step in range(200):
        state, _ = program.step(state, batches[step], numbers)
    return of(state), before


def test_updates_below_half_an_ulp_survive_stochastic_rounding_and_kahan():
    """What float32 moves on average, nearest does not move at all where weights are large enough."""
    exact, start = kernels()
    moved = exact - start
    large = abs(start) > 0.05  # half an ulp there is 2**-14, above every step

    for update, moves in (("nearest", False), ("stochastic", True), ("kahan", True)):
        after, before = kernels(policy=BFLOAT, update=update)
        got = (after - before)[large]
        slope = np.dot(got, moved[large]) / np.dot(moved[large], moved[large])
        assert (abs(slope - 1) < 0.2) if moves else (slope == 0)


def test_random_rounding_follows_the_seed_of_the_run_and_has_a_stream_of_its_own():
    def after(seed):
        program, state, batches, numbers = prepared(policy=BFLOAT, update="stochastic", seed=seed)
        key = np.asarray(state.opt_state.inner.key)
        return key, program.step(state, batches[0], numbers)[0].params

    (key, first), (_, again), (other, _) = after(1), after(1), after(2)

    assert_same_bits(first, again)
    assert (key != other).any()
    assert (key != np.asarray(jax.random.key_data(jax.random.key(1)))).any()


def test_zero_second_moments_are_counted_where_they_are_stored_in_few_bits():
    """A linear code of 8 bits loses what is below 1/510 of the largest square; most gradients are."""
    model, optim = {"kind": "mlp", "hidden": [64]}, {"kind": "adam", "lr": 1e-3}
    shares = {}
    for state in ("int8@tensor", "dynamic8@tensor", "float32"):
        program, start, batches, numbers = prepared(model=model, optim={**optim, "state": state})
        _, metrics = program.step(start, batches[0], numbers)
        shares[state] = float(metrics["zero_second_moment_fraction"])
    program, start, batches, numbers = prepared(model=model, optim=optim)
    plain = program.step.eval_shape(start, batches[0], numbers)[1]

    # Pixels that are always black have gradients of zero in every format.
    assert shares["int8@tensor"] > shares["dynamic8@tensor"] + 0.2
    assert shares["dynamic8@tensor"] == pytest.approx(shares["float32"], abs=0.02)
    assert "zero_second_moment_fraction" not in plain


def test_a_skipped_step_changes_neither_parameters_nor_batch_statistics():
    model = {"kind": "convnet", "channels": [4], "norm": "batch"}
    scale = {"kind": "dynamic", "init": 2.0**40, "max": 2.0**40}
    program, state, batches, numbers = prepared(model=model, policy="float16_mixed", loss_scale=scale)
    before = jax.tree.map(np.array, state)

    after, metrics = program.step(state, batches[0], numbers)

    assert int(metrics["skipped_steps"]) == 1
    assert int(after.step) == 1
    assert int(after.first_nonfinite) == -1
    assert_same_bits(after.params, before.params)
    assert_same_bits(after.model_state, before.model_state)
    assert float(after.opt_state.loss_scale) == 2.0**39


def test_an_applied_step_changes_batch_statistics():
    program, state, batches, numbers = prepared(model={"kind": "convnet", "channels": [4], "norm": "batch"})
    before = jax.tree.map(np.array, state.model_state)

    after, _ = program.step(state, batches[0], numbers)

    changed = [(a != b).any() for a, b in zip(jax.tree.leaves(after.model_state), jax.tree.leaves(before), strict=True)]
    assert all(changed)


def test_the_first_nonfinite_step_is_remembered():
    program, state, batches, numbers = prepared()
    bad = {**batches[0], "inputs": np.full_like(batches[0]["inputs"], np.nan)}
    seen = []
    for batch in (batches[0], bad, batches[2], batches[3]):
        state, metrics = program.step(state, batch, numbers)
        seen.append(int(metrics["first_nonfinite"]))

    assert seen == [-1, 2, 2, 2]


@pytest.mark.parametrize("policy", [HALF, BFLOAT])
def test_stored_parameters_are_the_masters_rounded_after_every_step(policy):
    program, state, batches, numbers = prepared(policy=policy, master_weights=True)
    for step in range(5):
        state, _ = program.step(state, batches[step], numbers)

        masters = state.opt_state.inner.master
        rounded = jax.tree.map(lambda p, m: np.asarray(m).astype(p.dtype), state.params, masters)
        assert {m.dtype for m in jax.tree.leaves(masters)} == {np.dtype("float32")}
        assert_same_bits(state.params, rounded)


@pytest.mark.parametrize(
    "optim",
    [
        {"kind": "sgd", "lr": 0.05, "momentum": 0.9},
        {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"kind": "sgd", "lr": 0.05, "weight_decay": 0.01, "schedule": {"kind": "cosine"}},
    ],
    ids=["momentum", "nesterov_decay", "cosine"],
)
@pytest.mark.parametrize("shift", [-8, 24])
def test_a_loss_shift_changes_no_bit_of_a_float32_run(optim, shift):
    def after(shift):
        program, state, batches, numbers = prepared(optim=optim, train={"loss_shift": shift})
        for step in range(10):
            state, _ = program.step(state, batches[step], numbers)
        return state.params

    assert_same_bits(after(shift), after(0))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1]),
        ({"kind": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
        ({"kind": "warmup_cosine", "warmup": 2, "end": 0.5}, [0, 0.5, 1, 0.75]),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_schedules_give_the_worked_factors(schedule, expected):
    one = config(optim={"kind": "sgd", "lr": 1.0, "schedule": schedule}, train={"steps": 4, "log_every": 1})
    tx = build_optimizer(one, hyper(one))
    params = jnp.zeros(())
    state = tx.init(params)
    rates = []
    for _ in range(4):
        updates, state = tx.update(jnp.ones(()), state, params)
        rates.append(-float(updates))

    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_a_rule_that_matches_nothing_is_found_before_anything_runs():
    one = config(policy="params=float32,compute=bfloat16,output=float32;**/nothing/**:compute=float32")
    program = program_for(one, SPEC)

    with pytest.raises(ValueError, match="nothing"):
        check_program(program, one)
    assert program.step._cache_size() == 0
