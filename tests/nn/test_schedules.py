"""When quantizers start and stop learning: schedules that are none are refused, and what is frozen stays as it is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.nn import FakeQuant, FoldedBatchNorm, LinenFakeQuant, LinenFoldedBatchNorm
from precision_lab.quant import init_state, known_scales, quantize_with_state

X = np.random.default_rng(0).standard_normal((32, 16), np.float32)
SPECS = ["int4@channel,lsq", "uint4,lsq+", "uint4,pact,mse"]
NONSENSE = [
    ({"delay": -1}, ValueError, "count training steps from 0 on"),
    ({"freeze": -1}, ValueError, "count training steps from 0 on"),
    ({"delay": 1.5}, TypeError, "expected a whole number"),
    ({"delay": None}, TypeError, "delay=None counts training steps: expected a whole number"),
    ({"freeze": "3"}, TypeError, "or None for never"),
    ({"freeze": True}, TypeError, "expected a whole number"),
    ({"momentum": float("nan")}, ValueError, r"in \(0, 1\]"),
    ({"momentum": "fast"}, TypeError, "is no number"),
]


@pytest.mark.parametrize(("options", "error", "says"), NONSENSE)
def test_a_schedule_that_is_none_is_refused_everywhere(options, error, says):
    """Where a module is made, not in its first call; a stateless quantizer passes nothing over either."""
    with pytest.raises(error, match=says):
        pl.QAT("weight=int4@channel,lsq", **options)
    for spec in ("int8", "int4,lsq"):
        with pytest.raises(error, match=says):
            FakeQuant(spec, **options)
        with pytest.raises(error, match=says):
            LinenFakeQuant(spec, **options).init(jax.random.key(0), X, train=True)


@pytest.mark.parametrize("freeze", [-1, 2.0])
def test_statistics_of_a_folded_batch_norm_do_not_freeze_before_the_first_step(freeze):
    pair = nnx.Linear(16, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises((ValueError, TypeError), match="training steps"):
        FoldedBatchNorm(*pair, freeze=freeze)
    module = LinenFoldedBatchNorm(linen.Dense(4), linen.BatchNorm(), freeze=freeze)
    with pytest.raises((ValueError, TypeError), match="training steps"):
        module.init(jax.random.key(0), X, train=True)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("saved", [1, 2, 3, 5])
def test_frozen_numbers_stay_though_an_optimizer_goes_on(spec, saved):
    """Adam's momentum and weight decay move what has no gradient; a run that goes on from any step sees the same."""
    x = np.abs(X) if "uint4" in spec else X
    tx = optax.adamw(0.02, weight_decay=0.1)

    @jax.jit
    def step(state, moments):
        def loss(learned):
            value, after = quantize_with_state(x, spec, state._replace(learned=learned), axis=0, train=True, freeze=3)
            return jnp.mean((value - 2 * x) ** 2), after

        grads, after = jax.grad(loss, has_aux=True)(state.learned)
        updates, moments = tx.update(grads, moments, state.learned)
        return after._replace(learned=optax.apply_updates(state.learned, updates)), moments

    def scales_of(state, moments, steps):
        seen = []
        for _ in range(steps):
            seen.append((known_scales(spec, state), state, moments))
            state, moments = step(state, moments)
        return [*seen, (known_scales(spec, state), state, moments)]

    state = init_state(spec, x, axis=0, freeze=3)
    seen = scales_of(state, tx.init(state.learned), 7)
    _, state, moments = seen[saved]
    again = scales_of(*jax.tree.map(np.asarray, (state, moments)), 7 - saved)

    as_arrays = [{name: np.asarray(array) for name, array in numbers.items()} for numbers, *_ in seen]
    for name in as_arrays[0]:
        assert all(np.any(a[name] != b[name]) for a, b in itertools.pairwise(as_arrays[:4]))
        for later in as_arrays[4:]:
            np.testing.assert_array_equal(later[name], as_arrays[3][name])
    assert any(np.any(seen[7][1].learned[name] != seen[3][1].learned[name]) for name in state.learned)
    jax.tree.map(np.testing.assert_array_equal, again[-1], seen[7])


def test_a_frozen_model_computes_what_it_did_at_the_freeze_and_converts_to_that():
    model = pl.prepare_qat(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), "weight=int4@channel,lsq", X, freeze=2)
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=pl.nn.QuantParam)
    step, outs = nnx.jit(_step), []
    for _ in range(5):
        model.eval()
        outs.append(np.asarray(nnx.jit(lambda model: model(X))(model)))
        model.train()
        step(model, optimizer)

    model.eval()
    converted = pl.convert(model, None, X)

    assert np.any(outs[2] != outs[1])
    np.testing.assert_array_equal(outs[3], outs[2])
    np.testing.assert_array_equal(outs[4], outs[2])
    np.testing.assert_allclose(nnx.jit(lambda model: model(X))(converted), outs[2], rtol=1e-5, atol=1e-5)


def _step(model, optimizer):
    grads = nnx.grad(lambda m: jnp.mean((m(X) - 1) ** 2), argnums=nnx.DiffState(0, pl.nn.QuantParam))(model)
    optimizer.update(model, grads)


def test_a_number_is_frozen_for_each_layer_of_a_scan():
    layers = np.random.default_rng(1).standard_normal((3, 16, 16), np.float32) / 4

    def loss(params, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0] ** 2)

    qat, params = pl.QAT("weight=int3@channel,lsq", freeze=1), {"w": layers}
    state = qat.init(loss, params, X)
    run, step = jax.jit(qat.apply(loss, train=False)), jax.jit(qat.value_and_grad(loss))
    before = run(params, state, X)[0]
    for _ in range(3):
        (_, (_, grads)), state = step(params, state, X)
        state = state | {"learned": jax.tree.map(lambda x: 1.1 * x, state["learned"])}

    found = state["running"]["w"]["rhs"]
    np.testing.assert_array_equal(found["frozen"], [1, 1, 1])
    np.testing.assert_allclose(found["frozen_scale"], state["learned"]["w"]["rhs"]["scale"] / 1.1**2, rtol=1e-6)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert run(params, state, X)[0] != before


def test_quantizers_without_a_state_of_their_own_may_wait_beside_ones_that_freeze():
    """A delay holds back the dynamic weights too, which have nothing to freeze."""
    qat, params = pl.QAT("weight=int2@channel,activation=int8@tensor,ema", delay=1, freeze=2), {"w": X[:16]}
    state = qat.init(lambda p, x: x @ p["w"], params, X)
    run = jax.jit(qat.apply(lambda p, x: x @ p["w"]))

    outs = []
    for n in range(4):
        out, state = run(params, state, (n + 1) * X)
        outs.append(np.asarray(out) / (n + 1))

    np.testing.assert_allclose(outs[0], X @ X[:16], rtol=1e-5, atol=1e-5)
    assert np.abs(outs[1] - outs[0]).max() > 0.1
    assert int(state["running"]["w"]["lhs"]["updates"]) == 2


def test_a_state_made_for_another_schedule_is_refused():
    for made, given in ((None, 2), (2, None)):
        state = init_state("int4,lsq", X, freeze=made)
        with pytest.raises(ValueError, match="give init_state the same freeze="):
            quantize_with_state(X, "int4,lsq", state, train=True, freeze=given)


@pytest.mark.parametrize("quantizer", ["uint4@channel", "uint4@channel,mse"])
def test_converting_negative_weights_to_codes_without_a_sign_says_so(quantizer):
    """It was an error of JAX about a traced boolean."""
    with pytest.raises(ValueError, match=r"has no negative values, but the smallest of \(16, 4\) is -"):
        pl.convert(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), f"weight={quantizer}", X)


@pytest.mark.parametrize("view", [pl.convert, lambda model, policy, x: pl.compare(model, ["float32", policy], x)])
def test_a_view_without_training_says_what_to_leave_out(view):
    with pytest.raises(ValueError, match="Without training, leave out lsq"):
        view(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), "weight=int4@channel,lsq", X)


def test_a_state_that_freezes_can_be_donated_to_its_first_step():
    x = jnp.linspace(-1, 1, 32).reshape(8, 4)
    module = FakeQuant("int8@channel,lsq", example=x, axis=0, freeze=2)
    state = init_state("int8@channel,lsq", x, axis=0, freeze=2)

    step = jax.jit(
        lambda state: quantize_with_state(x, "int8@channel,lsq", state, axis=0, train=True, freeze=2), donate_argnums=0
    )
    value, after = step(state)
    of_module = nnx.jit(lambda module: module(x), donate_argnums=0)(module)

    assert int(after.running["steps"]) == 1
    np.testing.assert_array_equal(of_module, value)
