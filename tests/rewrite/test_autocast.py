"""ops=autocast: every operation in the type of its category. Numbers of checks are those of the acceptance list."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

import precision_lab as pl
from precision_lab.policy import OP_TABLE, Policy
from precision_lab.rewrite import apply_to_function, full_precision, sites_of_function
from tests.jaxprs import equations, products

AUTOCAST = Policy.preset("bfloat16_autocast")
LOW = ("bfloat16", "bfloat16", "float32")


def autocast(fn, **settings):
    """`fn` of arrays under autocast, its parameters being an empty tuple."""
    policy = AUTOCAST.with_rule("**", **settings) if settings else AUTOCAST
    under = apply_to_function(lambda _, *args: fn(*args), policy)
    return lambda *args: under((), *args)


def dtypes_of(fn, primitive, *args):
    """The floating dtypes among the operands of every `primitive` in the jaxpr of `fn`, in order."""
    found = [eqn for eqn in equations(jax.make_jaxpr(fn)(*args)) if eqn.primitive.name == primitive]
    return [tuple(str(v.aval.dtype) for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)) for eqn in found]


class Net(linen.Module):
    """Convolution, norm, attention and dense layers, as anybody writes them."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(8, (3, 3))(x))
        x = linen.LayerNorm()(x.reshape(x.shape[0], -1, 8))
        x = x + linen.MultiHeadDotProductAttention(num_heads=2)(x)
        return linen.log_softmax(linen.Dense(5)(linen.gelu(x).mean(1)))


@functools.cache
def net():
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    return Net(), jax.jit(Net().init)(jax.random.key(0), x), x


def loss_of(model, x):
    return lambda variables: -model.apply(variables, x)[:, 0].mean()


def test_every_product_of_forward_and_backward_is_low_and_gradients_are_float32():
    """Check 10: 7 dense or attention products and 1 convolution forward, twice that less the input's backward."""
    model, variables, x = net()
    under = pl.apply_policy(model, AUTOCAST)

    found = products(jax.grad(loss_of(under, x)), variables)
    grads, plain = (jax.jit(jax.grad(loss_of(one, x)))(variables) for one in (under, model))

    assert set(found) == {LOW}
    assert len(found) == len(products(jax.grad(loss_of(model, x)), variables))
    ours, theirs = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)]) for tree in (grads, plain))
    assert ours.dtype == np.float32
    # Rounding by 2^-9 in some ten layers; the acceptance list asks for 2 %.
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.parametrize("primitive", ["exp", "log", "rsqrt", "reduce_sum", "square", "reduce_max"])
def test_exponentials_norms_and_sums_run_in_float32(primitive):
    """Check 11, on the types of the operands in the jaxpr of the forward pass."""
    model, variables, x = net()

    found = dtypes_of(lambda v: pl.apply_policy(model, AUTOCAST).apply(v, x), primitive, variables)

    assert found
    assert {dtype for operands in found for dtype in operands} == {"float32"}


def test_a_softmax_over_32k_bfloat16_logits_is_as_good_as_in_float32():
    """Check 11: the logits are a product's bfloat16 result; what follows must add no error of its own."""
    weight = jax.random.normal(jax.random.key(0), (8, 32_000)) * 3
    x = jax.random.normal(jax.random.key(1), (1, 8))

    out = jax.jit(autocast(lambda w, x: jax.nn.log_softmax(x @ w)))(weight, x)

    narrow = (x.astype(jnp.bfloat16) @ weight.astype(jnp.bfloat16)).astype(jnp.bfloat16)
    logits = np.asarray(narrow, np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    # 1e-3 of the largest magnitude, some 30: rounding the differences to bfloat16 would be off by 0.1.
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)


def test_results_of_products_stay_low_through_additions_layout_and_activations():
    one = jnp.ones((2, 2))

    assert dtypes_of(autocast(lambda w, x: (x @ w) + (w @ x)), "add", one, one) == [("bfloat16", "bfloat16")]
    assert dtypes_of(autocast(lambda w, x: (x @ w) * 0.5), "mul", one, one) == [("bfloat16", "bfloat16")]
    assert dtypes_of(autocast(lambda w, x: (x @ w) + x), "add", one, one) == [("float32", "float32")]
    assert dtypes_of(autocast(lambda w, x: jax.nn.relu(x @ w) * (x @ w)), "mul", one, one) == [("bfloat16", "bfloat16")]


def test_a_number_that_bfloat16_and_float16_cannot_hold_widens_what_it_is_added_to():
    one = jnp.ones((2, 2))
    half = apply_to_function(lambda w, x: (x @ w) + 1e6, Policy.parse("float16_mixed,ops=autocast"))

    assert jnp.all(half(one, one) == 1e6 + 2)
    assert dtypes_of(half, "add", one, one) == [("float32", "float32")]


def test_integers_keys_and_float64_are_left_exactly_as_they_are():
    """Check 12."""

    def fn(n, key, x):
        return n * 2, jax.random.normal(key, (3,)), jnp.cumsum(n), x * 3

    with jax.enable_x64(True):
        args = (jnp.arange(5), jax.random.key(0), jnp.linspace(0, 1, 7, dtype=jnp.float64))
        plain, under = fn(*args), autocast(fn)(*args)

    for ours, theirs in zip(under, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


W = jnp.eye(3) * 0.5
TRANSFORMED = {
    "jit": lambda x: jax.jit(lambda x: jnp.tanh(x @ W))(x),
    "vmap": lambda x: jax.vmap(lambda row: jnp.exp(row @ W))(x),
    "grad": lambda x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ W) @ W))(x),
    "scan": lambda x: lax.scan(lambda c, _: (jnp.tanh(c @ W), c), x, None, length=3),
    "while": lambda x: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ W), (0, x)),
    "cond": lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ W, lambda x: x, x),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.sin(x @ W) @ W)(x),
    "custom_jvp": lambda x: jax.nn.relu(x @ W) @ W,
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_output_types_are_those_of_the_function_without_autocast(name):
    """Check 13."""
    fn, x = TRANSFORMED[name], jnp.ones((3, 3))
    under = apply_to_function(
        lambda _, x: fn(x), Policy.parse("params=float32,compute=bfloat16,output=float32,ops=autocast")
    )

    plain = jax.eval_shape(fn, x)
    ours = jax.eval_shape(under, (), x)
    value = jax.jit(under)((), x)

    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(lambda a: (a.shape, a.dtype), plain)
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(jax.jit(fn)(x)), strict=True):
        # bfloat16 keeps 8 bits; five roundings at most.
        np.testing.assert_allclose(a, b, rtol=5 * 2**-8)


def test_full_precision_marks_a_region_as_decorator_and_as_context_manager():
    """Check 14."""
    one = jnp.ones((2, 2))

    @full_precision
    def angles(w, x):
        return x @ w

    def fn(w, x):
        with full_precision():
            inside = x @ w
        return angles(w, x) + inside + x @ w

    table = sites_of_function(lambda _, *args: fn(*args), AUTOCAST, (), [one, one], {})

    assert products(autocast(fn), one, one).count(("float32",) * 3) == 2
    assert products(autocast(fn), one, one).count(LOW) == 1
    assert [site.reason for site in table] == ["full_precision region", "full_precision region", ""]


@pytest.mark.filterwarnings("ignore:policy .* reaches none of the 2 products")
def test_resizing_an_image_stays_in_float32():
    """Check 14: its products ask for the highest precision themselves."""
    image = jnp.ones((3, 3))

    assert set(products(autocast(lambda x: jax.image.resize(x, (4, 4), "bilinear")), image)) == {("float32",) * 3}


def test_explain_lists_every_operation_once_and_names_those_that_are_not_in_the_table():
    """Check 15."""

    def fn(x):
        return jnp.fft.rfft(jnp.exp(x @ x)).real + jnp.linalg.cholesky(x @ x)[0, 0]

    x = jnp.eye(4)
    table = sites_of_function(lambda _, x: fn(x), AUTOCAST, (), [x], {}, everything=True)

    by_op = {site.op: site for site in table}
    assert by_op["exp"].treatment.op == "float32"
    assert by_op["dot_general"].compute.name == "bfloat16"
    assert by_op["cholesky"].reason == "not in the op table: runs as traced"
    assert len({site.full_name for site in table}) == len(table)
    assert pl.explain(lambda _, x: fn(x), (), x, policy=AUTOCAST).to_dicts() == table.to_dicts()


@jax.custom_vjp
def cubed(x):
    return x**3


cubed.defvjp(lambda x: (cubed(x), x), lambda x, g: (3 * x**2 * g,))


@jax.custom_batching.custom_vmap
def exp(x):
    return jnp.sinh(x) + jnp.cosh(x)


@exp.def_vmap
def _(size, has_batch, x):
    return exp(x), has_batch[0]


def test_a_function_with_rules_of_its_own_goes_by_its_name_where_it_has_one():
    """All were called custom_jvp_call, so that a rule for relu had to count them."""
    unnamed = jax.custom_jvp(lambda x: x)
    unnamed.defjvp(lambda x, t: (x[0], t[0]))
    fns = (jax.nn.relu, unnamed, jax.nn.relu6, jax.nn.relu, cubed, jnp.exp, exp)

    def fn(_, x):
        with jax.named_scope("mlp"):
            return functools.reduce(lambda x, fn: fn(x), fns, x)

    def rounded(spec):
        table = sites_of_function(fn, Policy.parse(spec), (), [jnp.ones(3)], {}, everything=True)
        return [site.full_name for site in table if site.treatment and site.treatment.round]

    by_name = [
        f"mlp:{name}" for name in ("relu#0", "custom_jvp_call#1", "relu6#0", "relu#1", "cubed#0", "exp#0", "exp#1")
    ]
    assert rounded("round=bfloat16") == by_name
    assert rounded("float32;**:relu#*:round=bfloat16") == ["mlp:relu#0", "mlp:relu#1"]
    # By its primitive a function is counted among all of that primitive.
    assert rounded("float32;mlp:custom_jvp_call#3:round=bfloat16") == ["mlp:relu#1"]
    assert len(rounded("float32;**:custom_*#*:round=bfloat16")) == 6


def test_without_autocast_explain_says_that_operations_run_as_written():
    table = sites_of_function(lambda w, x: jnp.exp(x @ w), Policy(), jnp.eye(2), [jnp.eye(2)], {}, everything=True)

    assert [site.reason for site in table if site.op == "exp"] == ["as written: ops=products"]


def test_a_rule_edits_the_table_by_primitive_and_by_scope():
    one = jnp.ones((2, 2))

    def fn(w, x):
        with jax.named_scope("head"):
            y = jnp.exp(x @ w)
        return y + jnp.exp(x @ w)

    everywhere = apply_to_function(fn, AUTOCAST.with_rule("**:exp#*", op="low"))
    head = apply_to_function(fn, AUTOCAST.with_rule("head:exp#*", op="low"))

    both = apply_to_function(fn, AUTOCAST.with_rule("head:*", op="low"))
    assert dtypes_of(both, "exp", one, one) == [("bfloat16",), ("float32",)]
    assert dtypes_of(everywhere, "exp", one, one) == [("bfloat16",)] * 2
    assert dtypes_of(head, "exp", one, one) == [("bfloat16",), ("float32",)]
    with pytest.raises(ValueError, match="is a product, and op= is for other operations: say compute="):
        apply_to_function(fn, AUTOCAST.with_rule("**:dot_general#*", op="low"))(one, one)
    with pytest.raises(ValueError, match="matched no site: '\\*\\*:sinh"):
        apply_to_function(fn, AUTOCAST.with_rule("**:sinh#*", op="low"))(one, one)


def test_every_name_of_the_table_is_a_primitive_of_jax():
    import jax.extend.core.primitives as primitives

    public = {getattr(primitives, name).name for name in dir(primitives) if name.endswith("_p")}
    # Not re-exported by jax.extend, or in one of the two tested versions only.
    elsewhere = {"copy_p", "split", "optimization_barrier", "log2", "one_minus_square", "polynomial", "square"}

    assert set(OP_TABLE) - public <= elsewhere


def test_rounding_by_rule_puts_the_result_of_every_operation_and_every_cotangent_on_the_grid():
    """Every op in bfloat16, in a float32 container: oracle is ml_dtypes after every NumPy operation."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(1000, dtype=np.float32) for _ in range(3))
    under = apply_to_function(lambda _, a, b, c: a * b + c, Policy().with_rule("**", round="bfloat16"))

    def bf16(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)

    np.testing.assert_array_equal(jax.jit(under)((), a, b, c), bf16(bf16(a * b) + c))
    cotangent = jax.jit(jax.grad(lambda a: jnp.sum(1.2345 * under((), a, b, c))))(a)
    np.testing.assert_array_equal(cotangent, bf16(np.float32(1.2345)) * b)


def test_rounding_all_operations_of_a_policy_is_one_setting():
    under = apply_to_function(lambda _, a: jnp.exp(a) - 1, Policy.parse("float32,round=float8_e4m3fn"))

    # e^0.3 = 1.3499 is 1.375 in E4M3 (step 0.125), and 0.375 is on the grid.
    assert under((), jnp.float32(0.3)) == 0.375


def test_the_table_says_of_an_operation_what_concerns_it_and_cuts_no_setting_off():
    """Quantizers are not for operations that are no products; a long setting was cut off at the table's edge."""
    policy = Policy.parse("w8a8,attention=int8@token,gradient=int8@token,stochastic;**:exp#*:round=float8_e4m3fn")

    product, exponential = sites_of_function(lambda w, x: jnp.exp(x @ w), policy, jnp.eye(2), [jnp.eye(2)], {})

    assert exponential.settings == "op=never,round=float8_e4m3fn"
    assert (exponential.lhs, exponential.rhs) == ("float32[2,2]", "")
    printed = str(sites_of_function(lambda w, x: jnp.exp(x @ w), policy, jnp.eye(2), [jnp.eye(2)], {}))
    assert "".join(line.split("│")[7].strip() for line in printed.splitlines() if "│" in line).startswith(
        product.settings
    )


@jax.custom_vjp
def by_hand(x, w):
    return jnp.exp(x) @ w


by_hand.defvjp(
    lambda x, w: (by_hand(x, w), (x, w)), lambda kept, ct: (ct @ kept[1].T * jnp.exp(kept[0]), jnp.exp(kept[0]).T @ ct)
)
WITH_RULES = {
    "softplus": lambda x, w: jax.nn.softplus(x),
    "logaddexp": lambda x, w: jnp.logaddexp(x, 0.1),
    "custom_vjp": by_hand,
    "custom_linear_solve": lambda x, w: jax.lax.custom_linear_solve(
        lambda y: y @ w, x, lambda _, y: y @ jnp.linalg.inv(w), lambda _, y: y @ jnp.linalg.inv(w).T
    ),
}


@pytest.mark.parametrize("name", WITH_RULES)
def test_a_function_with_rules_of_its_own_is_rounded_as_one_operation(name):
    """Its results were not rounded at all, and no table listed it."""
    fn, policy = WITH_RULES[name], Policy.parse("float32,round=bfloat16")
    x, w = (jax.random.normal(jax.random.key(seed), (8, 8)) for seed in (0, 1))
    under = apply_to_function(lambda _, x, w: fn(x, w), policy)

    def bf16(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    value, back = jax.vjp(lambda x: under((), x, w), x)
    expected, exact_back = jax.vjp(lambda x: fn(x, w), x)

    np.testing.assert_array_equal(value, bf16(expected))
    np.testing.assert_array_equal(under((), x, w), value)
    np.testing.assert_allclose(back(x)[0], exact_back(bf16(x))[0], rtol=1e-5, atol=1e-5)
    table = sites_of_function(lambda _, x, w: fn(x, w), policy, (), [x, w], {}, everything=True)
    [listed] = [site for site in table if "custom" in site.op]
    assert listed.settings == "op=never,round=bfloat16"


def test_a_rule_for_what_is_inside_a_function_with_rules_of_its_own_is_refused():
    x = jnp.eye(8)

    with pytest.raises(ValueError, match=r"sets round=bfloat16, which acts on none .* inside a function with rules"):
        apply_to_function(lambda p, x: by_hand(x, p["w"]), Policy.parse("float32;w:round=bfloat16"))({"w": x}, x)
    with pytest.raises(ValueError, match=r"'\*\*:log1p#\*'"):
        apply_to_function(lambda _, x: jax.nn.softplus(x), Policy.parse("float32;**:log1p#*:round=bfloat16"))((), x)
    with pytest.raises(ValueError, match=r"matches only sites that cannot be cast .* has rules of its own"):
        apply_to_function(lambda _, x: jax.nn.softplus(x), AUTOCAST.with_rule("**:custom_jvp_call#*", op="low"))((), x)
