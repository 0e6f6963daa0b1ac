"""The rewrite through control flow, custom derivatives and odd signatures."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import meta
from jax import lax
from jax.experimental import pallas

from precision_lab.policy import Policy
from precision_lab.rewrite import apply_to_function, sites_of_function
from tests.jaxprs import assert_same_bits, equations, products

BFLOAT16 = Policy.preset("bfloat16_mixed")
LOW = ("bfloat16", "bfloat16", "float32")


@jax.custom_jvp
def doubled_jvp(a, b):
    """A product whose derivative rule is twice the true one, so that losing the rule shows."""
    return a @ b


@doubled_jvp.defjvp
def _(primals, tangents):
    (a, b), (da, db) = primals, tangents
    return doubled_jvp(a, b), 2 * (da @ b + a @ db)


@jax.custom_vjp
def doubled_vjp(a, b):
    """The same as a custom_vjp."""
    return a @ b


doubled_vjp.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (2 * g @ kept[1].T, 2 * kept[0].T @ g))

MESH = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
P = jax.sharding.PartitionSpec


def sharded(fn, **options):
    """Returns `fn(w, x)` with the rows of `x` sharded; with `check_vma`, types say which values differ by shard."""
    return jax.shard_map(fn, mesh=MESH, in_specs=(P(), P("x")), out_specs=P("x"), **options)


STRUCTURES = {
    "plain": lambda w, x: x @ w,
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "scan": lambda w, x: lax.scan(lambda c, _: (c @ w, c), x, None, length=3)[0],
    "scan over weights": lambda w, x: lax.scan(lambda c, v: (c @ v, None), x, jnp.stack([w, 2 * w]))[0],
    "scan reversed": lambda w, x: lax.scan(lambda c, v: (c @ v, c), x, jnp.stack([w, 2 * w]), reverse=True)[1].sum(0),
    "fori": lambda w, x: lax.fori_loop(0, 3, lambda _, c: c @ w, x),
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: 2 * x @ w, x),
    "switch": lambda w, x: lax.switch(1, [lambda x: x, lambda x: x @ w, lambda x: 2 * x @ w], x),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w)(w, x),
    "remat with policy": lambda w, x: jax.checkpoint(
        lambda w, x: jnp.tanh(x @ w) @ w, policy=jax.checkpoint_policies.dots_saveable
    )(w, x),
    "custom_jvp": lambda w, x: doubled_jvp(x, w),
    "custom_vjp": lambda w, x: doubled_vjp(x, w),
    "custom_jvp in scan": lambda w, x: lax.scan(lambda c, _: (doubled_jvp(c, w), None), x, None, length=2)[0],
    "custom_vjp in remat": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(doubled_vjp(x, w)))(w, x),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "shard_map": sharded(lambda w, x: x @ w),
    "shard_map unchecked": sharded(lambda w, x: x @ w, check_vma=False),
    "shard_map with psum": jax.shard_map(
        lambda w, x: lax.psum(x @ w, "x"), mesh=MESH, in_specs=(P("x"), P(None, "x")), out_specs=P()
    ),
    "scan and remat in shard_map": sharded(
        lambda w, x: lax.scan(lambda c, _: (jax.checkpoint(lambda c: c @ w)(c), None), x, None, length=2)[0]
    ),
    "custom_jvp in shard_map": sharded(lambda w, x: doubled_jvp(x, w)),
    "custom_vjp in shard_map": sharded(lambda w, x: doubled_vjp(x, w), check_vma=False),
    "platform_dependent": lambda w, x: lax.platform_dependent(
        w, x, default=lambda w, x: x @ w, tpu=lambda w, x: 2 * x @ w
    ),
    "jvp": lambda w, x: jax.jvp(lambda w: x @ w @ w, (w,), (x,))[1],
    "linearize": lambda w, x: jax.linearize(lambda w: x @ w @ w, w)[1](x),
    "associative_scan": lambda w, x: lax.associative_scan(jnp.matmul, jnp.stack([w, x, w])),
    "nested": lambda w, x: jax.jit(
        lambda w, x: lax.scan(lambda c, _: (jax.checkpoint(lambda c: c @ w)(c), None), x, None, length=2)[0]
    )(w, x),
}


def operands():
    """Small integers, which bfloat16 holds exactly: there, a policy must change nothing at all."""
    rng = np.random.default_rng(0)
    draw = [rng.integers(-2, 3, (3, 3)) for _ in range(2)]
    return tuple(jnp.asarray(x, jnp.float32) for x in draw)


def loss_of(structure):
    return lambda w, x: jnp.sum(STRUCTURES[structure](w, x))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_product_in_every_structure_is_cast_forward_and_backward(structure):
    grad = jax.grad(apply_to_function(loss_of(structure), BFLOAT16))

    found = products(grad, *operands())

    assert found
    assert set(found) == {LOW}


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if "remat" not in s])
def test_values_and_gradients_are_exact_where_every_number_is_exact_in_the_format(structure):
    w, x = operands()
    x = x / 4

    under = jax.jit(jax.value_and_grad(apply_to_function(loss_of(structure), BFLOAT16)))

    assert_same_bits(under(w, x), jax.jit(jax.value_and_grad(loss_of(structure)))(w, x))


def test_a_while_loop_is_cast_in_its_body_and_in_its_condition():
    def count(w, x):
        return lax.while_loop(lambda s: jnp.sum(s[1] @ w) < 100, lambda s: (s[0] + 1, s[1] @ w), (0, x))

    w, x = 2 * jnp.eye(2), jnp.ones((1, 2))
    under = apply_to_function(count, BFLOAT16)

    assert set(products(under, w, x)) == {LOW}
    assert_same_bits(jax.jit(under)(w, x), count(w, x))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_float32_policy_leaves_the_jaxpr_of_a_float32_function_as_it_is(structure):
    w, x = operands()
    under = apply_to_function(STRUCTURES[structure], Policy())

    names = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(under)(w, x))]

    assert names == [eqn.primitive.name for eqn in equations(jax.make_jaxpr(STRUCTURES[structure])(w, x))]
    assert_same_bits(
        jax.jit(jax.value_and_grad(lambda w: jnp.sum(under(w, x))))(w),
        jax.jit(jax.value_and_grad(lambda w: loss_of(structure)(w, x)))(w),
    )


def test_the_map_of_a_linear_solve_is_cast_in_the_solution_and_in_its_derivative():
    """The oracle is the solution itself: with a map that halves, x = 2 (w b), and all numbers are exact."""
    halves = jnp.eye(3) / 2

    def solve(w, x):
        mapped = lambda v: (w + halves) @ v - w @ v  # noqa: E731
        return lax.custom_linear_solve(mapped, x, lambda f, b: 2 * b + 0 * f(b), lambda f, b: 2 * b + 0 * f(b))

    w, x = operands()
    under = apply_to_function(solve, BFLOAT16)
    pulled = jax.jit(lambda w, x: jax.vjp(under, w, x)[1](x))(w, x)

    assert_same_bits(jax.jit(under)(w, x), 2 * x)
    # d(A^-1 b) = A^-1 (db - dA x): A does not depend on w, so only b has a gradient.
    assert_same_bits(pulled[1], 2 * x)
    np.testing.assert_array_equal(pulled[0], jnp.zeros_like(w))
    assert {site.compute.name for site in sites_of_function(solve, BFLOAT16, w, [x], {})} == {"bfloat16"}
    text = jax.jit(jax.grad(lambda w, x: under(w, x).sum())).lower(w, x).as_text()
    assert "bf16" in text
    assert not [line for line in text.splitlines() if "dot_general" in line and "bf16" not in line]


@pytest.mark.parametrize("name", ["dots_saveable", "dots_with_no_batch_dims_saveable"])
@pytest.mark.parametrize("operation", ["dot", "conv"])
def test_a_remat_policy_that_saves_products_saves_those_under_a_policy(name, operation):
    """Saved, a product runs once forward; recomputed, twice."""

    def product(w, x):
        if operation == "dot":
            return x @ w
        return lax.conv_general_dilated(x[None, None], w[None, None], (1, 1), "SAME")[0, 0]

    def count(fn):
        return len(products(jax.grad(fn), *operands()))

    def twice(w, x):
        return jnp.sum(jnp.sin(product(w, jnp.sin(product(w, x)))))

    loss = jax.checkpoint(twice, policy=getattr(jax.checkpoint_policies, name))

    assert count(apply_to_function(loss, BFLOAT16)) == count(loss)
    # Two forward and three gradients, since x needs none; a convolution counts as a product to the first policy only.
    assert count(loss) == 5 + 2 * (operation == "conv" and name != "dots_saveable")


def test_what_a_policy_must_leave_alone_is_bit_identical_and_listed_with_its_reason():
    def mixed(params, n, x64):
        exact = jnp.einsum("i,j->ij", n.astype(jnp.float32), params["w"][0], precision="highest")
        return exact, n @ n, params["w"] @ params["w"]

    params, n = {"w": jnp.asarray([[1.0, 2.0], [3.0, 4.0]])}, jnp.arange(257, 259)
    under = apply_to_function(mixed, BFLOAT16)

    assert_same_bits(under(params, n, None)[:2], mixed(params, n, None)[:2])
    table = sites_of_function(mixed, BFLOAT16, params, [n, None], {})
    assert [site.reason for site in table] == ["explicit precision HIGHEST", "int32 operand", ""]
    assert [site.compute.name for site in table if site.compute] == ["bfloat16"]
    assert len(table.untouched) == 2


def test_a_rule_reaches_a_product_with_explicit_precision():
    def exact(w, x):
        return jnp.matmul(x, w, precision="highest")

    asked = Policy().with_rule("**", compute="bfloat16")

    assert products(apply_to_function(exact, asked), *operands()) == [LOW]


def test_a_policy_that_reaches_nothing_warns():
    under = apply_to_function(lambda n: n @ n, BFLOAT16)

    with pytest.warns(UserWarning, match="reaches none of the 1 products: int32 operand"):
        under(jnp.arange(3))


def kernel_of_pallas(body):
    out = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    return lambda w, x: pallas.pallas_call(body, out_shape=out, interpret=True)(w, x)


def multiply_in_kernel(w, x, out):
    out[...] = w[...] @ x[...]


def add_in_kernel(w, x, out):
    out[...] = w[...] + x[...]


def test_a_kernel_of_pallas_is_listed_with_the_products_inside():
    one = jnp.ones((4, 4))

    with pytest.warns(UserWarning, match="reaches none of the 1 products"):
        multiplying = sites_of_function(kernel_of_pallas(multiply_in_kernel), BFLOAT16, one, (one,), {})
    adding = sites_of_function(kernel_of_pallas(add_in_kernel), BFLOAT16, one, (one,), {})

    opaque = (":pallas_call#0", "policies do not enter this operation")
    inside = (":dot_general#0", "inside pallas_call, which policies do not enter")
    assert [(site.name, site.reason) for site in multiplying] == [inside, opaque]
    assert [(site.name, site.reason) for site in adding] == [opaque]


@pytest.mark.parametrize("setting", ["compute=float32", "op=low", "weight=int8@tensor"])
def test_a_rule_for_a_kernel_of_pallas_is_refused(setting):
    """op=low cast the operands of a kernel that was written for float32."""
    under = apply_to_function(kernel_of_pallas(add_in_kernel), Policy.parse(f"c=bf16,o=f32;**:pallas_call#*:{setting}"))

    with pytest.raises(ValueError, match=r"only sites that cannot be cast .*policies do not enter this operation"):
        under(jnp.ones((4, 4)), jnp.ones((4, 4)))


def test_the_results_of_a_kernel_of_pallas_can_be_rounded():
    third = jnp.full((4, 4), 1 / 3)
    under = apply_to_function(kernel_of_pallas(add_in_kernel), Policy.parse("float32;**:pallas_call#*:round=bfloat16"))

    assert np.array_equal(under(third, third), (third + third).astype(jnp.bfloat16).astype(jnp.float32))


def test_a_function_with_a_batching_rule_is_entered_and_so_is_its_rule():
    @jax.custom_batching.custom_vmap
    def linear(w, x):
        return x @ w

    @linear.def_vmap
    def _(size, batched, w, x):
        assert batched == [False, True]
        return -(x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], -1), True  # so that we see which one ran

    w, x = (jax.random.normal(jax.random.key(3), shape) for shape in ((8, 8), (5, 3, 8)))
    under = apply_to_function(lambda p, x: linear(p["w"], x), BFLOAT16)
    rounded = x.astype(jnp.bfloat16).astype(jnp.float32) @ w.astype(jnp.bfloat16).astype(jnp.float32)

    tangent = jax.jvp(lambda w: under({"w": w}, x[0]), (w,), (w,))[1]
    np.testing.assert_allclose(under({"w": w}, x[0]), rounded[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: under({"w": w}, x))(x), -rounded, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tangent, rounded[0], rtol=1e-5, atol=1e-5)
    table = sites_of_function(lambda p, x: linear(p["w"], x), BFLOAT16, {"w": w}, (x[0],), {})
    assert [site.name for site in table] == ["w"]
    assert {lhs for lhs, _, _ in products(jax.vmap(lambda x: under({"w": w}, x)), x)} == {"bfloat16"}


def test_rules_act_on_the_sites_they_name_and_no_others():
    params = {"up": {"kernel": jnp.ones((3, 3))}, "down": {"kernel": jnp.ones((3, 3))}}

    def mlp(params, x):
        with jax.named_scope("scores"):
            x = x @ x
        return x @ params["up"]["kernel"].T.reshape(3, 3) @ params["down"]["kernel"]

    policy = BFLOAT16.with_rule("**/down/**", compute="float32").with_rule("scores:*", compute="float16")
    under = apply_to_function(mlp, policy)

    assert [lhs for lhs, _, _ in products(under, params, jnp.ones((3, 3)))] == ["float16", "bfloat16", "float32"]
    names = [site.name for site in sites_of_function(mlp, policy, params, [jnp.ones((3, 3))], {})]
    assert names == ["scores:dot_general#0", "up/kernel", "down/kernel"]


def test_a_rule_that_matches_nothing_is_an_error_that_names_the_nearest_site():
    policy = BFLOAT16.with_rule("**/doun/**", compute="float32")
    under = apply_to_function(lambda p, x: x @ p["down"]["kernel"], policy)

    with pytest.raises(
        ValueError, match=r"1 of 1 rules matched no site: '\*\*/doun/\*\*'. Nearest site: 'down/kernel'"
    ):
        under({"down": {"kernel": jnp.ones((2, 2))}}, jnp.ones((2, 2)))


def test_a_product_of_a_parameter_without_a_path_goes_by_its_full_name():
    """It went by the empty string, which neither a table nor an error can show."""
    one = jnp.eye(2)
    under = apply_to_function(jnp.dot, BFLOAT16.with_rule("up/**", compute="float32"))

    assert [site.name for site in sites_of_function(jnp.dot, BFLOAT16, one, [one], {})] == [":dot_general#0"]
    with pytest.raises(ValueError, match=r"matched no site: 'up/\*\*'\. Nearest site: ':dot_general#0'"):
        under(one, one)


def test_the_path_of_a_parameter_survives_scans_casts_and_slices():
    params = {"blocks": jnp.ones((4, 3, 3)), "table": jnp.ones((7, 3), jnp.bfloat16)}

    def model(params, x):
        x = lax.scan(lambda c, w: (jax.jit(lambda c: c @ w)(c), None), x, params["blocks"])[0]
        return x @ params["table"].astype(jnp.float32).T[:, :5]

    table = sites_of_function(model, BFLOAT16, params, [jnp.ones((2, 3))], {})

    assert [site.path for site in table] == ["blocks", "table"]
    assert all(site.has_parameter for site in table)


def test_the_box_around_a_parameter_is_no_part_of_its_path():
    """Sites of an `nnx.State` ended in /value; a field of that name beside others still does."""
    graph, state = nnx.split(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    x, fields = (
        jnp.ones((2, 3)),
        collections.namedtuple("Fields", ["query", "value"])(jnp.ones((3, 3)), jnp.ones((3, 3))),
    )

    boxed = sites_of_function(lambda state, x: nnx.merge(graph, state)(x), BFLOAT16, state, (x,), {})
    partitioned = sites_of_function(
        lambda p, x: x @ p["w"].value, BFLOAT16, {"w": meta.Partitioned(x.T, ("a", "b"))}, (x,), {}
    )
    field = sites_of_function(lambda p, x: x @ p["a"].value @ p["a"].query, BFLOAT16, {"a": fields}, (x,), {})

    assert [site.name for site in (*boxed, *partitioned, *field)] == ["kernel", "w", "a/value", "a/query"]


def test_a_parameter_used_twice_is_two_sites_and_rules_can_tell_them_apart():
    policy = BFLOAT16.with_rule("w:dot_general#1", compute="float32")
    under = apply_to_function(lambda p, x: x @ p["w"] @ p["w"], policy)

    assert [lhs for lhs, _, _ in products(under, {"w": jnp.eye(2)}, jnp.eye(2))] == ["bfloat16", "float32"]


def linear_vjp():
    """A linear layer with a hand-written backward rule."""
    linear = jax.custom_vjp(lambda w, x: x @ w)
    linear.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
    return linear


def test_a_hand_written_backward_rule_follows_the_rules_of_its_layer():
    linear = linear_vjp()
    params = {"head": jnp.eye(2), "body": jnp.eye(2)}

    def model(p, x):
        return jnp.sum(linear(p["head"], linear(p["body"], x)))

    under = apply_to_function(model, Policy().with_rule("head", compute="bfloat16"))

    found = [lhs for lhs, _, _ in products(jax.grad(under), params, jnp.eye(2))]
    assert sorted(found) == ["bfloat16"] * 3 + ["float32"] * 3


def test_parameters_tell_the_products_of_a_backward_rule_apart():
    two = jax.custom_vjp(lambda a, b, x: x @ a @ b)
    two.defvjp(
        lambda a, b, x: (x @ a @ b, (a, b, x)),
        lambda kept, g: (jnp.zeros_like(kept[0]), jnp.zeros_like(kept[1]), g @ kept[1].T @ kept[0].T),
    )
    under = apply_to_function(lambda p, x: two(p["a"], p["b"], x).sum(), BFLOAT16.with_rule("b", compute="float32"))
    params = {"a": jnp.eye(2), "b": jnp.eye(2)}

    found = [lhs for lhs, _, _ in products(jax.grad(under, argnums=1), params, jnp.eye(2))]

    assert found == ["bfloat16", "float32", "float32", "bfloat16"]


def test_products_of_a_derivative_rule_that_cannot_be_told_apart_are_refused():
    linear = jax.custom_vjp(lambda w, x: x @ w @ w)
    linear.defvjp(lambda w, x: (x @ w @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
    under = apply_to_function(
        lambda p, x: linear(p["w"], x).sum(), BFLOAT16.with_rule("w:dot_general#1", compute="float32")
    )

    assert under({"w": jnp.eye(2)}, jnp.eye(2)) == 2.0
    with pytest.raises(ValueError, match=r"inside one custom derivative at .* different formats"):
        jax.grad(under)({"w": jnp.eye(2)}, jnp.eye(2))


@pytest.mark.parametrize("kind", ["custom_vjp", "custom_jvp"])
def test_products_in_a_derivative_rule_alone_are_reached(kind):
    if kind == "custom_vjp":
        fn = jax.custom_vjp(lambda w, x: w * x)
        fn.defvjp(lambda w, x: (w * x, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
    else:
        fn = jax.custom_jvp(lambda w, x: w * x)
        fn.defjvp(lambda primals, tangents: (primals[0] * primals[1], primals[1] @ tangents[0]))
    under = apply_to_function(lambda w, x: fn(w, x @ w).sum(), BFLOAT16)

    found = products(jax.grad(under), *operands())

    assert len(found) >= 2
    assert set(found) == {LOW}


def test_products_that_are_written_in_the_compute_dtype_get_their_derivative_in_it_too():
    def written(w, x):
        low = (v.astype(jnp.bfloat16) for v in (x, w))
        return jnp.sum(lax.dot_general(*low, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32))

    assert set(products(jax.grad(apply_to_function(written, BFLOAT16)), *operands())) == {LOW}


@pytest.mark.parametrize("precision", ["highest", "high", "bfloat16", "tensorfloat32"])
def test_a_default_matmul_precision_is_nobodys_explicit_choice(precision):
    under = apply_to_function(loss_of("scan"), BFLOAT16)

    with jax.default_matmul_precision(precision):
        found = products(jax.grad(under), *operands())

    assert set(found) == {LOW}


def test_a_rule_that_matches_only_what_cannot_be_cast_is_refused():
    under = apply_to_function(lambda p, x: x @ p["w"] + (p["n"] @ p["n"]), BFLOAT16.with_rule("n", compute="float16"))

    with pytest.raises(ValueError, match=r"rule 'n' matches only sites that cannot be cast \(n: int32 operand\)"):
        under({"w": jnp.eye(2), "n": jnp.eye(2, dtype=int)}, jnp.eye(2))


def test_products_of_an_operation_without_a_treatment_are_listed():
    lhs, rhs, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.asarray([1, 3])

    table = sites_of_function(lambda p, x, n: lax.ragged_dot(x, p, n), BFLOAT16, rhs, [lhs, sizes], {})

    assert [site.reason for site in table] == ["no policy reaches this operation yet"]


def test_keyword_arguments_may_have_any_name():
    under = apply_to_function(lambda p, x, *, root, policy, fn: (x @ p).sum() * root * policy * fn, BFLOAT16)

    assert under(jnp.eye(2), jnp.eye(2), root=2, policy=3, fn=5) == 60.0


def test_arguments_and_results_that_are_not_arrays_stay_python_values():
    def fn(params, x, scale=1, *, train, mode="sum"):
        assert isinstance(scale, int)
        assert train is True
        return {"out": getattr(jnp, mode)(x @ params) * scale, "mode": mode, "n": 3, "none": None}

    out = apply_to_function(fn, BFLOAT16)(jnp.eye(2), jnp.eye(2), 5, train=True)

    assert (out["out"], out["mode"], out["n"], out["none"]) == (10.0, "sum", 3, None)


def test_outputs_are_cast_and_nothing_else_in_them():
    under = apply_to_function(lambda w, x: (x @ w, jnp.arange(2), jax.random.key(0)), Policy.parse("c=f16"))

    out, integers, key = under(*operands())

    assert (out.dtype, integers.dtype) == (jnp.float16, jnp.int32)
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_closed_over_values_and_outer_transformations_are_fine():
    w, x = operands()

    def outer(w):
        under = apply_to_function(lambda p, x: x @ p * w.sum(), BFLOAT16)
        return jnp.sum(jax.vmap(lambda row: under(w, row[None]))(x))

    plain = jax.grad(lambda w: jnp.sum(x @ w * w.sum()))(w)
    np.testing.assert_array_equal(jax.jit(jax.grad(outer))(w), plain)


def test_names_of_jits_and_scopes_survive_the_rewrite():
    @jax.jit
    def attention(w, x):
        with jax.named_scope("scores"):
            return x @ w

    jaxpr = jax.make_jaxpr(apply_to_function(attention, BFLOAT16))(*operands())

    assert "attention" in {eqn.params.get("name") for eqn in equations(jaxpr)}
    scopes = [str(eqn.source_info.name_stack) for eqn in equations(jaxpr) if eqn.primitive.name == "custom_jvp_call"]
    assert scopes == ["scores"]


def test_library_code_works_under_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        grads = jax.grad(apply_to_function(loss_of("nested"), BFLOAT16))(*operands())

    assert grads.dtype == jnp.float32
