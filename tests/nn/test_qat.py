"""Training by policy: at every site the values, gradients and states of `quantize_with_state`, wherever the site is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import precision_lab as pl
from precision_lab.quant import fake_quantize, init_state, quantize_with_state

RNG = np.random.default_rng(0)
W, X = (RNG.standard_normal(shape, np.float32) for shape in ((16, 8), (4, 16)))
LAYERS = RNG.standard_normal((3, 16, 16), np.float32) / 4
POLICIES = {
    "weight=int4@channel,lsq,activation=int8@tensor,ema": ("int4@channel,lsq", "int8,ema"),
    "weight=int2@tensor,lsq,activation=uint4@tensor,lsq+": ("int2,lsq", "uint4,lsq+"),
    "weight=int4@group4,lsq,mse,activation=int4@tensor,pact": ("int4@group4,lsq,mse", "int4,pact"),
    "weight=int8@channel,activation=int8@tensor,affine,ema": ("int8@channel", "int8,affine,ema"),
}
LSQ = "weight=int4@channel,lsq,activation=int8@tensor,ema"


def product(params, x):
    return x @ params["w"]


def loss(params, x):
    return jnp.sum(product(params, x) ** 2) / 2


def assert_close(found, expected, **options):
    options = {"rtol": 1e-5, "atol": 1e-5} | options
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), found, expected)


def by_hand(weight, activation, params, states, x, *, train, **schedule):
    """Returns the loss and the states of the two quantizers after it, written with the functions of one array."""
    w, of_w = quantize_with_state(params["w"], weight, states[0], axis=0, train=train, **schedule)
    x, of_x = quantize_with_state(x, activation, states[1], axis=1, train=train, **schedule)
    return jnp.sum((x @ w) ** 2) / 2, (of_w, of_x)


def states_in(state, specs):
    """Returns the states of both operands as a QAT has them; the weights' empty where nothing asks for one."""
    quantizers = []
    for role, spec in zip(("rhs", "lhs"), specs, strict=True):
        learned, running = (state[kind].get("w", {}).get(role, {}) for kind in ("learned", "running"))
        empty = init_state(spec, jax.ShapeDtypeStruct((1, 1), jnp.float32), axis=0) if not running else None
        quantizers.append(empty or type(init_state("int8", X))(learned, running))
    return tuple(quantizers)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_site_is_quantized_as_the_functions_of_one_array_say(policy):
    """Three steps of training, on batches of different sizes, with gradients of everything; then evaluation."""
    weight, activation = POLICIES[policy]
    qat, params = pl.QAT(policy, momentum=0.3), {"w": W}
    state = qat.init(loss, params, X)
    step = jax.jit(qat.value_and_grad(loss))
    states = (init_state(weight, W, axis=0), init_state(activation, X, axis=1))

    def expected(params, learned, states, batch):
        known = [each._replace(learned=own) for each, own in zip(states, learned, strict=True)]
        return by_hand(weight, activation, params, known, batch, train=True, momentum=0.3)

    of_arrays = jax.jit(jax.value_and_grad(expected, (0, 1), has_aux=True))
    for batch in (X, 2 * X, X[::-1] / 3):
        (value, (grads, of_learned)), state = step(params, state, batch)

        learned = tuple(each.learned for each in states)
        (wanted, states), (dw, dl) = of_arrays(params, learned, states, batch)
        assert_close(value, wanted)
        assert_close(grads, dw, atol=1e-4)
        assert_close({"rhs": of_learned.get("w", {}).get("rhs", {})}, {"rhs": dl[0]}, atol=1e-3)
        assert_close({"lhs": of_learned.get("w", {}).get("lhs", {})}, {"lhs": dl[1]}, atol=1e-3)
        for found, one in zip(states_in(state, (weight, activation)), states, strict=True):
            if found.running.keys() == one.running.keys() and len(one.running) > 1:
                assert_close(found.running, one.running, rtol=1e-6)

    value, after = qat.apply(loss, train=False)(params, state, 5 * X)
    wanted, _ = by_hand(weight, activation, params, states_in(state, (weight, activation)), 5 * X, train=False)
    assert_close(value, wanted)
    assert after is state


def test_check_14_the_gradient_of_a_step_is_its_closed_form():
    """Section 2.1 of LSQ in float64: q - v inside the grid and its ends outside, over sqrt(N Q); its start too."""
    qat = pl.QAT("weight=int4@tensor,lsq")
    state = qat.init(product, {"w": W}, X)
    scale = state["learned"]["w"]["rhs"]["scale"]

    (_, (_, learned)), _ = qat.value_and_grad(lambda p, x: jnp.sum(product(p, x)))({"w": W}, state, X)

    np.testing.assert_allclose(scale, 2 * np.abs(W).mean() / np.sqrt(7), rtol=1e-6)
    v = W.astype(np.float64) / float(scale[0, 0])
    cotangent = np.broadcast_to(X.astype(np.float64).sum(0)[:, None], W.shape)
    slope = np.where(np.abs(v) < 7, np.rint(v) - v, 7 * np.sign(v))
    expected = (cotangent * slope).sum() / np.sqrt(W.size * 7)
    np.testing.assert_allclose(learned["w"]["rhs"]["scale"], expected, rtol=1e-5)


def test_check_14_the_gradient_of_a_clip_sums_over_what_is_clipped():
    qat, x = pl.QAT("weight=int8@channel,activation=uint4@tensor,pact"), 12 * np.abs(X)
    state = qat.init(product, {"w": W}, x)

    (_, (_, learned)), _ = qat.value_and_grad(lambda p, x: jnp.sum(product(p, x)))({"w": W}, state, x)

    w = np.asarray(fake_quantize(W, "int8@channel", axis=0), np.float64)
    cotangent = np.broadcast_to(w.sum(1), x.shape)
    assert 0 < (x >= 10).mean() < 1
    np.testing.assert_allclose(learned["w"]["lhs"]["alpha"], cotangent[x >= 10].sum(), rtol=1e-5)


def test_nothing_is_quantized_before_the_delay_and_nothing_moves_after_the_freeze():
    qat = pl.QAT("weight=int2@channel,lsq,activation=int4@tensor,ema,attention=int4@tensor", delay=2, freeze=3)
    state = qat.init(loss, {"w": W}, X)
    step, values, grads = jax.jit(qat.value_and_grad(loss)), [], []

    for n in range(5):
        (value, (_, learned)), state = step({"w": W}, state, (n + 1) * X)
        values.append(float(value) / (n + 1) ** 2)
        grads.append(float(jnp.abs(learned["w"]["rhs"]["scale"]).max()))

    np.testing.assert_allclose(values[:2], float(loss({"w": W}, X)), rtol=1e-5)
    assert all(abs(value / values[0] - 1) > 0.01 for value in values[2:])
    assert [grad > 0 for grad in grads] == [False, False, True, False, False]
    # An average with momentum 0.1 of the ranges of the first three batches.
    average = np.array([1, 0.1, 0.1]) @ [1, 2 - 1, 3 - 1.1] * X.max()
    np.testing.assert_allclose(state["running"]["w"]["lhs"]["high"], average, rtol=1e-6)
    assert int(state["running"]["w"]["lhs"]["steps"]) == 5


def test_a_delay_holds_back_quantizers_without_a_state_of_their_own_too():
    qat = pl.QAT("weight=int2@channel,activation=int8@tensor,ema", delay=1)
    state = qat.init(product, {"w": W}, X)
    run = qat.apply(product)

    first, state = run({"w": W}, state, X)
    second, _ = run({"w": W}, state, X)

    np.testing.assert_allclose(first, X @ W, rtol=1e-5, atol=1e-5)
    assert np.abs(second - X @ W).max() > 0.1


@pytest.mark.parametrize("how", ["plain", "checkpointed", "jitted inside"])
def test_layers_of_a_scan_have_a_state_each(how):
    """As the same layers written out; ranges and steps have a leading axis."""
    wrap = {"plain": lambda f: f, "checkpointed": jax.checkpoint, "jitted inside": jax.jit}[how]

    def scanned(params, x):
        return jnp.sum(jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w"])[0] ** 2)

    def unrolled(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    qat, params = pl.QAT("weight=int3@channel,lsq,activation=int8@tensor,ema"), {"w": LAYERS}
    state, flat = qat.init(scanned, params, X), qat.init(unrolled, list(LAYERS), X)
    step, by_layer = jax.jit(qat.value_and_grad(scanned)), jax.jit(qat.value_and_grad(unrolled))

    for batch in (X, 3 * X):
        (value, (grads, learned)), state = step(params, state, batch)
        (wanted, (each_grad, each_learned)), flat = by_layer(list(LAYERS), flat, batch)

    def stacked(tree):
        return {"w": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[str(n)] for n in range(3)))}

    assert learned["w"]["rhs"]["scale"].shape == (3, 1, 16)
    assert_close(value, wanted)
    assert_close(grads["w"], jnp.stack(each_grad), atol=1e-4)
    assert_close(learned, stacked(each_learned), atol=1e-4)
    assert_close(state["running"], stacked(flat["running"]))


def test_steps_of_a_scan_over_time_share_a_state_that_moves_once():
    inputs = RNG.standard_normal((5, 4, 16), np.float32) * np.arange(1, 6, dtype=np.float32)[:, None, None]

    def over_time(params, xs):
        return jnp.sum(jax.lax.scan(lambda h, x: (h + x @ params["w"], None), jnp.zeros((4, 8)), xs)[0])

    qat, params = pl.QAT(LSQ, momentum=0.5), {"w": W}
    state = qat.init(over_time, params, inputs)
    run = jax.jit(qat.apply(over_time))

    _, state = run(params, state, inputs)
    _, after = run(params, state, 2 * inputs)

    first = inputs.max((1, 2)).mean()
    assert state["learned"]["w"]["rhs"]["scale"].shape == (1, 8)
    np.testing.assert_allclose(state["running"]["w"]["lhs"]["high"], first, rtol=1e-6)
    np.testing.assert_allclose(after["running"]["w"]["lhs"]["high"], 1.5 * first, rtol=1e-6)
    low = -inputs.min((1, 2)).mean()
    np.testing.assert_allclose(state["running"]["w"]["lhs"]["scale"], max(low, first) / 127, rtol=1e-6)
    assert [int(each["running"]["w"]["lhs"]["steps"]) for each in (state, after)] == [1, 2]


def test_a_branch_that_is_not_taken_keeps_its_state():
    def branched(params, x, flag):
        return jax.lax.cond(flag, lambda: x @ params["a"], lambda: x @ params["b"])

    qat, params = pl.QAT(LSQ), {"a": W, "b": -W}
    state = qat.init(branched, params, X, jnp.bool_(True))

    _, after = jax.jit(qat.apply(branched))(params, state, X, jnp.bool_(True))

    assert int(after["running"]["a"]["lhs"]["updates"]) == 1
    assert_close(after["running"]["b"], state["running"]["b"], rtol=0, atol=0)
    np.testing.assert_array_equal(state["learned"]["b"]["rhs"]["scale"], np.ones((1, 8), np.float32))


def test_a_batch_of_states_is_each_of_them():
    qat = pl.QAT(LSQ)
    params = {"w": jnp.stack([W, 2 * W])}
    state = jax.jit(jax.vmap(lambda p: qat.init(product, p, X)))(params)

    outs, after = jax.jit(jax.vmap(qat.apply(product), in_axes=(0, 0, None)))(params, state, X)

    by_itself = jax.jit(lambda one: qat.apply(product)(one, qat.init(product, one, X), X))
    for n in range(2):
        out, alone = by_itself({"w": params["w"][n]})
        assert_close(outs[n], out)
        assert_close(jax.tree.map(lambda leaf, n=n: leaf[n], after), alone)


def test_tables_and_products_without_parameters_have_states_too():
    def attends(params, tokens):
        x = jnp.take(params["table"], tokens, axis=0)
        return jnp.einsum("td,sd->ts", x, x)

    qat = pl.QAT("embedding=int4@channel,lsq,attention=int8@tensor,ema")
    params, tokens = {"table": W}, jnp.arange(6)
    state = qat.init(attends, params, tokens)

    out, after = qat.apply(attends)(params, state, tokens)

    [(_, roles)] = state["learned"].items()
    table = fake_quantize(W, "int4@channel", axis=1, scale=roles["lhs"]["scale"])
    x = fake_quantize(table[:6], "int8@tensor")
    np.testing.assert_allclose(out, x @ x.T, rtol=1e-5, atol=1e-5)
    assert sum("updates" in running for roles in after["running"].values() for running in roles.values()) == 2


@pytest.mark.parametrize("setting", ["weight=int4@channel,lsq", "activation=int8@tensor,ema", "weight=uint4,pact"])
def test_a_policy_alone_refuses_quantizers_whose_state_would_be_lost(setting):
    with pytest.raises(ValueError, match=r"no state that could hold it: say pl\.prepare_qat"):
        pl.apply_policy(product, setting)({"w": W}, X)


def test_a_policy_alone_refuses_a_table_and_a_gradient_with_a_state():
    with pytest.raises(ValueError, match="no state that could hold it"):
        pl.apply_policy(lambda p, i: jnp.take(p, i, axis=0), "embedding=int4@channel,lsq")(W, jnp.arange(3))
    with pytest.raises(ValueError, match="quantizes its cotangent"):
        pl.apply_policy(product, "weight=int8@channel,gradient=int8@tensor,ema")({"w": W}, X)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("w8a8", {}, "has no quantizer with a state at any site"),
        ("weight=int8@channel,ema,gradient=int8@token", {}, "quantize each of its products anew"),
        ("weight=int8@channel,ema,backward=original", {}, "quantize each of its products anew"),
        ("weight=int8@channel,gradient=int8@tensor,ema", {}, "has no running range"),
        ("weight=int8@channel,gradient=int8@token", {"delay": 1}, "cannot wait for the end of a delay"),
        ("weight=int8@channel,lsq,activation=int8@token,execution=native", {}, "execution=native multiplies codes"),
    ],
)
def test_a_state_without_a_place_is_refused(policy, options, message):
    with pytest.raises(ValueError, match=message):
        pl.QAT(policy, **options).init(product, {"w": W}, X)


def test_a_product_inside_a_custom_derivative_is_refused():
    @jax.custom_vjp
    def own(w, x):
        return x @ w

    own.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, ct: (kept[1].T @ ct, ct @ kept[0].T))

    with pytest.raises(ValueError, match="inside a custom derivative"):
        pl.QAT(LSQ).init(lambda p, x: own(p["w"], x), {"w": W}, X)


def test_two_bits_learn_digits_better_with_a_learned_step():
    """Against absmax and a straight-through estimator, both from the same float32 start; two seeds, paired."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

    def cross_entropy(params, x, y):
        hidden = jax.nn.relu(x @ params["in"])
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], y).mean()

    tx = optax.adam(3e-3)

    @functools.partial(jax.jit, static_argnums=(0, 2))  # one program for both seeds
    def trained(policy, params, steps):
        qat = None if policy is None else pl.QAT(policy)
        state = qat.init(cross_entropy, params, x, y) if qat else {"learned": {}}
        moving = (params, state["learned"])

        def step(carry, _):
            (params, learned), state, opt = carry
            if qat is None:
                value, grads = jax.value_and_grad(cross_entropy)(params, x, y)
                grads = (grads, {})
            else:
                (value, grads), state = qat.value_and_grad(cross_entropy)(params, state | {"learned": learned}, x, y)
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates((params, learned), updates), state, opt), value

        (moving, _, _), losses = jax.lax.scan(step, (moving, state, tx.init(moving)), length=steps)
        return moving[0], losses[-10:].mean()

    for seed in range(2):
        keys = jax.random.split(jax.random.key(seed))
        params = {"in": jax.random.normal(keys[0], (64, 32)) / 8, "out": jax.random.normal(keys[1], (32, 10)) / 6}
        params, _ = trained(None, params, 60)
        losses = [
            trained(f"weight=int2@tensor{how},activation=int8@tensor,ema", params, 100)[1] for how in (",lsq", "")
        ]
        assert losses[0] < 0.7 * losses[1], losses
