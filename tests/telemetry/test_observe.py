"""Observation against gradients worked out by hand, unrolled loops, and the unobserved function."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

from precision_lab.nn import apply_policy
from precision_lab.policy import Policy
from precision_lab.rewrite import apply_to_function, mark, trace_program
from precision_lab.telemetry import Reading, observe, observed, tensor_stats, tree_stats
from tests.jaxprs import assert_same_bits, equations

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 4, 4)).astype(np.float32)


def loss(params, x):
    return ((x @ params["w"]) ** 2).sum() / 2


def deep(params, x):
    """A scan over layers, each under remat."""

    @jax.checkpoint
    def layer(h, w):
        return jnp.tanh(h @ w)

    return (lax.scan(lambda h, w: (layer(h, w), None), x, params["w"])[0] ** 2).sum() / 2


def unrolled(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params[f"w{i}"])
    return (x**2).sum() / 2


def numbers(reading):
    return {k: v for k, v in reading.to_dict().items() if k != "nonfinite"}


stats_of = jax.jit(tensor_stats, static_argnums=1)


def assert_statistics_of(reading, expected):
    """Asserts that a reading, with its rounding errors, is that of an array; the tolerance is for orders of sums."""
    own = Reading(jax.device_get(stats_of(jnp.asarray(expected), reading.fmt)), reading.fmt, True)
    got, want = numbers(reading), numbers(own)
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("policy", ["float32", "float8_e4m3fn"])
def test_operands_outputs_and_cotangents_are_those_worked_by_hand(policy):
    """For y = x w and the loss |y|^2 / 2, the cotangents are dy = y, dw = x^T y and dx = y w^T."""
    policy = Policy.parse(f"compute={policy}")
    w = W[0]

    seen = observe(loss, {"w": w}, X, policy=policy)

    def quantized(x):
        return np.asarray(x, np.float32).astype(policy.compute.dtype).astype(np.float32)

    y = quantized(X) @ quantized(w)
    assert_statistics_of(seen["w", "lhs"], X)
    assert_statistics_of(seen["w", "rhs"], w)
    assert_statistics_of(seen["w", "output"], y)
    assert_statistics_of(seen["w", "output_cotangent"], y)
    assert_statistics_of(seen["w", "rhs_cotangent"], quantized(X).T @ quantized(y))
    assert seen["w", "output_cotangent"].fmt == policy.compute
    assert [(m.site, m.role) for m in seen.marks][:4] == [
        ("w", role) for role in ("lhs", "rhs", "output", "output_cotangent")
    ]


def test_without_a_scalar_there_is_only_the_forward_pass():
    seen = observe(lambda p, x: x @ p["w"], {"w": W[0]}, X)

    assert {mark.role for mark in seen.marks} == {"lhs", "rhs", "output"}
    with pytest.raises(TypeError, match=r"scalar output to differentiate, got float32\[6, 4\]; give loss="):
        observe(lambda p, x: x @ p["w"], {"w": W[0]}, X, grad=True)


def test_a_scan_with_remat_is_observed_as_its_unrolled_loop():
    scanned = observe(deep, {"w": W}, X, policy="bfloat16_mixed", per_layer=True)
    flat = observe(unrolled, {f"w{i}": w for i, w in enumerate(W)}, X, policy="bfloat16_mixed")

    assert len(scanned) == 6
    for role in ("lhs", "rhs", "output", "output_cotangent", "lhs_cotangent", "rhs_cotangent"):
        for i, layer in enumerate(scanned["w", role].layers):
            if (f"w{i}", role) != ("w0", "lhs_cotangent"):  # x is no parameter: unrolled, its gradient is not needed
                assert numbers(layer) == pytest.approx(numbers(flat[f"w{i}", role]), rel=1e-5, abs=1e-6)


def test_layers_merged_on_device_are_the_layers_merged_on_the_host():
    apart = observe(deep, {"w": W}, X, per_layer=True)
    merged = observe(deep, {"w": W}, X)

    for mark_, reading in merged:
        assert numbers(reading) == pytest.approx(numbers(apart[mark_.site, mark_.role]), rel=1e-5, abs=1e-6)
        assert reading.count == 3 * (W[0].size if "rhs" in mark_.role else X.size)


@pytest.mark.parametrize("fn", [deep, lambda p, x: loss({"w": p["w"][1]}, x)], ids=["scan", "plain"])
@pytest.mark.parametrize("policy", ["float32", "bfloat16_mixed", "compute=float8_e4m3fn"])
def test_watching_changes_no_bit(fn, policy):
    step = jax.value_and_grad(apply_to_function(fn, Policy.parse(policy)))

    out, seen = jax.jit(observed(step, rounding=True, limit=None))({"w": W}, X)

    assert_same_bits(out, jax.jit(step)({"w": W}, X))
    assert len(seen) == 4


def test_inside_jit_and_outside_are_the_same():
    step = observed(jax.value_and_grad(apply_to_function(deep, Policy.parse("bfloat16_mixed"))), rounding=True)

    eager, compiled = step({"w": W}, X)[1], jax.jit(step)({"w": W}, X)[1]

    assert eager.marks == compiled.marks
    for a, b in zip(eager, compiled, strict=True):
        assert numbers(a[1]) == pytest.approx(numbers(b[1]), rel=1e-5)


def test_a_function_compiled_before_is_observed_and_afterwards_is_not():
    fn = jax.jit(apply_to_function(loss, Policy.parse("float32")))
    before = str(jax.make_jaxpr(fn)({"w": W[0]}, X))

    seen = observed(fn)({"w": W[0]}, X)[1]

    assert len(seen) == 3
    assert str(jax.make_jaxpr(fn)({"w": W[0]}, X)) == before
    assert "precision_mark" not in before


def test_observations_of_steps_add_up_inside_a_scan():
    step = observed(apply_to_function(loss, Policy.parse("float32")), limit=None, rounding=True)

    def many(xs):
        return lax.scan(lambda _, x: (None, step({"w": W[0]}, x)[1]), None, xs)[1]

    seen = jax.jit(many)(jnp.stack([X, 2 * X]))

    assert_statistics_of(seen["w", "lhs"], np.stack([X, 2 * X]))


def test_merging_two_steps_is_observing_both():
    step = jax.jit(observed(apply_to_function(loss, Policy.parse("float32")), limit=None, rounding=True))

    seen = step({"w": W[0]}, X)[1].merged(step({"w": W[0]}, 8 * X)[1])

    assert_statistics_of(seen["w", "lhs"], np.concatenate([X, 8 * X]))


def test_when_is_asked_at_every_step():
    step = observed(
        apply_to_function(lambda p, x, n: loss(p, x), Policy.parse("float32")), when=lambda p, x, n: n % 3 == 0
    )

    counts = [jax.jit(step)({"w": W[0]}, X, n)[1]["w", "lhs"].count for n in range(4)]

    assert counts == [X.size, 0, 0, X.size]
    assert_same_bits(jax.jit(step)({"w": W[0]}, X, 1)[0], jax.jit(loss)({"w": W[0]}, X))


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("limit", [None, 10])
def test_when_it_looks_is_to_observe_and_else_the_observation_is_empty(limit, per_layer):
    """Through a scan and remat, whose statistics are merged or stacked."""
    step = jax.value_and_grad(apply_to_function(deep, Policy.parse("bfloat16_mixed")))
    options = {"limit": limit, "per_layer": per_layer, "rounding": True}

    run = jax.jit(lambda look: observed(step, when=lambda *_: look, **options)({"w": W}, X))
    (out, seen), (same, blind) = run(True), run(False)

    expected, always = jax.jit(observed(step, **options))({"w": W}, X)
    assert_same_bits((out, same), (expected, expected))
    assert seen.marks == blind.marks == always.marks
    for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(always), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert [reading.count for _, reading in blind] == [0] * 4
    assert_same_bits(jax.tree.leaves(seen.merged(blind)), jax.tree.leaves(seen))


def test_no_product_is_in_the_conditional_of_when():
    """There XLA's CPU compiler leaves the convolutions of weight gradients in a form a hundred times slower."""

    def fn(params, x):
        return (lax.conv(x, params["k"], (1, 1), "SAME").reshape(2, -1) @ params["w"]).sum()

    step = jax.grad(apply_to_function(fn, Policy.parse("float32")))
    params = {"k": jnp.ones((3, 3, 2, 2)), "w": jnp.ones((48, 3))}

    jaxpr = jax.make_jaxpr(observed(step, limit=10, when=lambda p, x: x[0, 0, 0, 0] > 0))(
        params, jnp.ones((2, 3, 4, 4))
    )

    conds = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "cond"]
    inside = {eqn.primitive.name for cond in conds for branch in cond.params["branches"] for eqn in equations(branch)}
    assert "scatter-add" in inside
    assert not inside & {"dot_general", "conv_general_dilated"}


def test_when_must_say_whether_to_look():
    step = apply_to_function(lambda p, x: x @ p["w"], Policy.parse("float32"))

    with pytest.raises(TypeError, match="when= returned None"):
        observed(step, when=lambda p, x: None)({"w": W[0]}, X)


def test_loops_count_their_iterations_and_branches_only_when_taken():
    def fn(params, x):
        x = lax.fori_loop(0, 5, lambda _, h: h @ params["loop"], x)
        x = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ params["while"]), (0, x))[1]
        return lax.cond(x.sum() > 1e9, lambda h: h @ params["never"], lambda h: h @ params["taken"] @ params["b"], x)

    seen = observe(fn, {k: 0.1 * W[0] for k in ("loop", "while", "never", "taken", "b")}, X)

    counts = {mark.site: reading.count for mark, reading in seen if mark.role == "lhs"}
    assert counts == {"loop": 5 * 24, "while": 2 * 24, "never": 0, "taken": 24, "b": 24}


def test_custom_derivatives_are_observed_in_both_passes():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, ct: (ct @ kept[1].T, kept[0].T @ ct))

    seen = observe(lambda p, x: (product(jax.nn.silu(x @ p["a"]), p["b"]) ** 2).sum() / 2, {"a": W[0], "b": W[1]}, X)

    h = X @ W[0]
    y = (h / (1 + np.exp(-h))) @ W[1]
    assert_statistics_of(seen["b", "output"], y)
    assert ("a", "output_cotangent") in [(m.site, m.role) for m in seen.marks]


def test_marked_values_are_reported_with_their_gradients():
    def fn(params, x):
        h = mark({"h": x @ params["w"], "n": 3}, "hidden")["h"]
        return (jnp.exp(h) * 2).sum()

    seen = observe(fn, {"w": W[0]}, X, roles=["value", "value_cotangent"])

    assert [m.site for m in seen.marks] == ["hidden/h", "hidden/h"]
    assert_statistics_of(seen["hidden/h", "value"], X @ W[0])
    assert_statistics_of(seen["hidden/h", "value_cotangent"], 2 * np.exp(X @ W[0]))


def test_a_mark_is_nothing_to_jit_and_passes_every_transformation():
    def plain(x):
        return jnp.sin(x) * 2

    def marked(x):
        return mark(jnp.sin(mark(x, "in")), "out") * 2

    x = jnp.arange(3.0)
    for transform in (
        lambda f: f,
        jax.vmap,
        lambda f: jax.vmap(jax.grad(f)),
        lambda f: lambda x: jax.jvp(f, (x,), (x,)),
        lambda f: jax.vmap(jax.hessian(f)),
        lambda f: jax.linearize(f, x)[1],
        jax.checkpoint,
    ):
        assert_same_bits(jax.jit(transform(marked))(x), jax.jit(transform(plain))(x))
    assert jax.jit(marked).lower(x).as_text() == jax.jit(plain).lower(x).as_text().replace("jit_plain", "jit_marked")


def test_the_first_tensor_that_is_not_finite_is_named():
    def fn(params, x):
        h = jnp.log(x @ params["a"] * 0)  # -inf
        return ((h @ params["b"]) @ params["c"]).sum()

    params = {"a": W[0], "b": W[1], "c": W[2]}

    assert observe(fn, params, X).first_nonfinite() == ("b", "lhs")
    assert observe(loss, {"w": W[0]}, X).first_nonfinite() is None
    assert observe(fn, params | {"a": np.full((4, 4), 3e38, np.float32)}, X).first_nonfinite() == ("a", "output")


def test_a_tree_is_reported_by_path_and_names_its_first_leaf_that_is_not_finite():
    tree = {"a": {"w": X, "n": np.arange(3)}, "b": [W[0], np.array([1, np.nan], np.float32)], "c": np.float32([np.inf])}

    seen = jax.jit(tree_stats)(tree)

    assert seen.sites == ["a/w", "b/0", "b/1", "c"]
    assert_statistics_of(seen["a/w", "value"], X)
    assert seen.first_nonfinite() == ("b/1", "value")
    assert tree_stats(tree, "float8_e4m3fn")["a/w", "value"].fmt.name == "float8_e4m3fn"


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.down = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.norm(self.up(x))))


def test_an_nnx_model_is_observed_and_not_changed():
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))

    seen = observe(model, X, policy="bfloat16_mixed", loss=lambda y: (y**2).sum() / 2)

    assert seen.sites == ["up/kernel", "down/kernel"]
    assert seen["up/kernel", "lhs"].count == X.size
    down = apply_policy(model, "bfloat16_mixed")(X) - model.down.bias.get_value()
    assert seen["down/kernel", "output"].amax == pytest.approx(float(jnp.abs(down).max()), rel=1e-5)
    assert_same_bits(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model))), before)


def test_a_linen_model_is_observed():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
            return linen.Dense(2)(x)

    variables = Model().init(jax.random.key(0), X, train=False)

    seen = observe(Model(), variables, X, train=True, mutable=["batch_stats"], loss=lambda y: (y**2).sum())

    assert seen.sites == ["Dense_0/kernel", "Dense_1/kernel"]
    assert_statistics_of(seen["Dense_0/kernel", "output"], X @ variables["params"]["Dense_0"]["kernel"])


def test_what_a_function_is_called_with_is_an_argument_of_what_is_compiled(monkeypatch):
    """As constants, data had its histograms folded by the compiler: 10 s for scikit-learn's digits."""
    traced = []
    module = sys.modules[observe.__module__]  # `precision_lab.telemetry.observe` is the function
    monkeypatch.setattr(module, "trace_program", lambda *given: traced.append(trace_program(*given)) or traced[-1])

    observe(loss, {"w": W[0]}, X)

    assert all(any(array is X for array in each.arrays) for each in traced)
    assert not [const for each in traced for const in each.jaxpr.consts if np.shape(const) == X.shape]


def test_what_cannot_be_observed_is_refused():
    with pytest.raises(ValueError, match="nothing to observe"):
        observed(loss)({"w": W[0]}, X)
    with pytest.raises(ValueError, match="unknown role 'outputs'"):
        observe(loss, {"w": W[0]}, X, roles=["outputs"])
    with pytest.raises(ValueError, match="cannot be differentiated: observe the gradient"):
        jax.grad(lambda p: observed(apply_to_function(loss, Policy.parse("float32")))(p, X)[0])({"w": W[0]})
    with pytest.raises(TypeError, match="instance or a function"):
        observe(Net, X)
    with pytest.raises(KeyError, match=r"nothing observed at \('w', 'bias'\); there are \('w', 'lhs'\)"):
        observe(loss, {"w": W[0]}, X)["w", "bias"]
    with pytest.raises(ValueError, match="grad must be True, False or 'auto', got 'yes'"):
        observe(loss, {"w": W[0]}, X, grad="yes")
    with pytest.raises(ValueError, match="different sites"):
        observe(loss, {"w": W[0]}, X).merged(observe(loss, {"v": W[0], "w": W[0]}, X, grad=False))
