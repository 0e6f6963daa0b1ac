"""The cast treatment. Oracle: the product, in float64 by NumPy, of operands rounded by ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from precision_lab.policy import Policy
from precision_lab.rewrite import apply_to_function
from tests.jaxprs import products

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float8_e5m2": ml_dtypes.float8_e5m2}
# (lhs shape, rhs shape, dimension numbers): every order of kept, contracted and batch axes that models use.
DOTS = {
    "matrix": ((5, 7), (7, 3), (((1,), (0,)), ((), ()))),
    "matrix_transposed": ((7, 5), (3, 7), (((0,), (1,)), ((), ()))),
    "dense": ((2, 5, 7), (7, 3), (((2,), (0,)), ((), ()))),
    "vector": ((7,), (7,), (((0,), (0,)), ((), ()))),
    "outer": ((4,), (3,), (((), ()), ((), ()))),
    "attention_scores": ((2, 5, 3, 7), (2, 6, 3, 7), (((3,), (3,)), ((0, 2), (0, 2)))),
    "attention_values": ((2, 3, 5, 6), (2, 6, 3, 7), (((3,), (1,)), ((0, 1), (0, 2)))),
    "two_contracted": ((2, 5, 3, 4), (3, 4, 6), (((2, 3), (0, 1)), ((), ()))),
    "middle_axis": ((2, 7, 5, 3), (2, 7, 4, 3), (((1,), (1,)), ((0, 3), (0, 3)))),
}


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rounded(x, name):
    """Rounds with ml_dtypes and returns float64; tf32 keeps 10 of float32's mantissa bits, here by exact scaling."""
    if name == "tf32":
        step = 2.0 ** (np.floor(np.log2(np.abs(x, dtype=np.float64))) - 10)
        return np.round(x / step) * step
    return np.asarray(x).astype(DTYPES[name]).astype(np.float64)


def dot64(lhs, rhs, dims):
    """The dot_general of float64 arrays, by einsum."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dims
    letters = iter("abcdefghijklmnop")
    left = [next(letters) for _ in range(lhs.ndim)]
    right = [next(letters) for _ in range(rhs.ndim)]
    for mine, theirs in zip((*lhs_contracted, *lhs_batch), (*rhs_contracted, *rhs_batch), strict=True):
        right[theirs] = left[mine]
    batch = [left[axis] for axis in lhs_batch]
    summed = {left[axis] for axis in lhs_contracted}
    kept = [x for x in left if x not in summed and x not in batch] + [x for x in right if x not in left]
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join(batch + kept)}", lhs, rhs)


@pytest.mark.parametrize("name", [*DTYPES, "tf32"])
@pytest.mark.parametrize("case", DOTS)
def test_a_product_is_the_product_of_the_rounded_operands_forward_and_backward(case, name):
    lhs_shape, rhs_shape, dims = DOTS[case]
    lhs, rhs = normal(lhs_shape, 0), normal(rhs_shape, 1)
    cotangent = normal(dot64(lhs, rhs, dims).shape, 2)
    fn = apply_to_function(lambda l, r: lax.dot_general(l, r, dims), Policy.parse(f"c={name},o=f32"))

    out, pullback = jax.jit(lambda l, r: jax.vjp(fn, l, r))(lhs, rhs)
    grads = jax.jit(lambda l, r, g: jax.vjp(fn, l, r)[1](g))(lhs, rhs, cotangent)

    wide = [jnp.asarray(rounded(x, name).astype(np.float32)) for x in (lhs, rhs, cotangent)]
    expected = jax.vjp(lambda l, r: lax.dot_general(l, r, dims, precision="highest"), *wide[:2])[1](wide[2])
    # float32 accumulation of at most 12 terms of size 1: a few ulp.
    np.testing.assert_allclose(out, dot64(rounded(lhs, name), rounded(rhs, name), dims), rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(grads, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
        assert actual.dtype == jnp.float32
    del pullback


CONVS = {
    "same": ((2, 8, 8, 3), (3, 3, 3, 4), {"padding": "SAME"}),
    "strided": ((2, 9, 9, 3), (3, 3, 3, 4), {"padding": "VALID", "window_strides": (2, 2)}),
    "dilated": ((1, 9, 9, 2), (3, 3, 2, 3), {"padding": "VALID", "rhs_dilation": (2, 2)}),
    "grouped": ((1, 6, 6, 4), (3, 3, 2, 6), {"padding": "SAME", "feature_group_count": 2}),
    "depthwise": ((1, 6, 6, 4), (3, 3, 1, 8), {"padding": "SAME", "feature_group_count": 4}),
    "transposed": ((1, 5, 5, 2), (3, 3, 2, 3), {"padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 2)}),
}


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_is_that_of_the_rounded_operands_forward_and_backward(case, name):
    lhs_shape, rhs_shape, options = CONVS[case]
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    lhs, rhs = normal(lhs_shape, 0), normal(rhs_shape, 1)

    def conv(l, r):
        return lax.conv_general_dilated(l, r, **options)

    cotangent = normal(jax.eval_shape(conv, lhs, rhs).shape, 2)
    fn = apply_to_function(conv, Policy.parse(f"c={name},o=f32"))

    out = jax.jit(fn)(lhs, rhs)
    grads = jax.jit(lambda l, r, g: jax.vjp(fn, l, r)[1](g))(lhs, rhs, cotangent)

    wide = [jnp.asarray(rounded(x, name).astype(np.float32)) for x in (lhs, rhs, cotangent)]
    np.testing.assert_allclose(out, conv(*wide[:2]), rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(grads, jax.vjp(conv, *wide[:2])[1](wide[2]), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5)
    dtypes = products(lambda l, r, g: jax.vjp(fn, l, r)[1](g), lhs, rhs, cotangent)
    assert len(dtypes) >= 3
    assert set(dtypes) == {(name, name, "float32")}


def test_a_weight_used_a_thousand_times_gets_the_gradient_1000():
    """Casting at entry would give 256: bfloat16 holds no odd number above that, and the sum stalls."""

    def repeat(weight, x):
        return lax.scan(lambda total, _: (total + (weight @ x)[0, 0], None), 0.0, None, length=1000)[0]

    one = jnp.ones((1, 1))
    under = apply_to_function(repeat, Policy.preset("bfloat16_mixed"))

    assert jax.grad(under)(one, one) == 1000.0
    assert jax.jit(jax.grad(under))(one, one) == 1000.0
    at_entry = jax.grad(lambda w: repeat(w.astype(jnp.bfloat16), one.astype(jnp.bfloat16)).astype(jnp.float32))(one)
    assert at_entry == 256.0


def test_second_derivatives_are_those_of_the_product_and_stay_in_the_policy():
    w, x = normal((3, 3), 0), normal((3,), 1)

    def energy(w, x):
        return jnp.sum((w @ x) ** 3)

    under = apply_to_function(energy, Policy.preset("bfloat16_mixed"))

    def curvature(fn):
        return jax.grad(lambda w: jnp.sum(jax.grad(fn)(w, x) ** 2))

    # Four products in a row of 2^-9 relative rounding each.
    np.testing.assert_allclose(curvature(under)(w), curvature(energy)(w), rtol=0.05, atol=0.05)
    assert set(products(curvature(under), w)) == {("bfloat16", "bfloat16", "float32")}


def test_a_batched_product_is_the_loop_over_its_members():
    w, xs = normal((4, 3), 0), normal((5, 2, 4), 1)
    under = apply_to_function(lambda w, x: x @ w, Policy.preset("bfloat16_mixed"))

    batched = jax.vmap(under, (None, 0))(w, xs)

    np.testing.assert_array_equal(batched, jnp.stack([under(w, x) for x in xs]))


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None), (2, 1), (None, 2), (1, None)])
@pytest.mark.parametrize("batched_inside", [False, True])
def test_derivatives_of_a_batched_product_are_the_loop_over_its_members(axes, batched_inside):
    """Forward mode exercises the batching of our primitive, reverse mode its transposes."""
    shapes = [(2, 4, 3), (2, 3, 5)] if batched_inside else [(4, 3), (3, 5)]
    dims = (((2,), (1,)), ((0,), (0,))) if batched_inside else (((1,), (0,)), ((), ()))
    operands = [
        normal(shape if axis is None else (*shape[:axis], 6, *shape[axis:]), seed)
        for seed, (shape, axis) in enumerate(zip(shapes, axes, strict=True))
    ]
    under = apply_to_function(lambda l, r: lax.dot_general(l, r, dims), Policy.preset("bfloat16_mixed"))
    tangents = [normal(x.shape, 7 + i) for i, x in enumerate(operands)]

    def derivatives(l, r, dl, dr):
        out, tangent = jax.jvp(under, (l, r), (dl, dr))
        return tangent, jax.vjp(under, l, r)[1](out)

    batched = jax.vmap(derivatives, (*axes, *axes))(*operands, *tangents)

    def member(i):
        axes_of = zip((*operands, *tangents), axes * 2, strict=True)
        return derivatives(*(x if axis is None else jnp.take(x, i, axis) for x, axis in axes_of))

    looped = jax.tree.map(lambda *members: jnp.stack(members), *(member(i) for i in range(6)))
    for actual, expected in zip(jax.tree.leaves(batched), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_derivatives_of_a_batched_convolution_are_the_loop_over_its_members(axes):
    shapes = [(1, 5, 5, 2), (3, 3, 2, 3)]
    operands = [normal(s if a is None else (4, *s), i) for i, (s, a) in enumerate(zip(shapes, axes, strict=True))]
    under = apply_to_function(
        lambda l, r: lax.conv_general_dilated(l, r, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        Policy.preset("bfloat16_mixed"),
    )

    def derivatives(l, r):
        out, tangent = jax.jvp(under, (l, r), (l, r))
        return tangent, jax.vjp(under, l, r)[1](out)

    batched = jax.vmap(derivatives, axes)(*operands)

    members = [derivatives(*(x if a is None else x[i] for x, a in zip(operands, axes, strict=True))) for i in range(4)]
    expected = jax.tree.map(lambda *m: jnp.stack(m), *members)
    for actual, wanted in zip(jax.tree.leaves(batched), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_the_forward_derivative_is_that_of_the_rounded_operands():
    w, x, dw = normal((4, 3), 0), normal((2, 4), 1), normal((4, 3), 2)
    under = apply_to_function(lambda w: x @ w, Policy.preset("bfloat16_mixed"))

    _, tangent = jax.jvp(under, (w,), (dw,))

    expected = rounded(x, "bfloat16") @ rounded(dw, "bfloat16")
    np.testing.assert_allclose(tangent, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jacfwd(under)(w), jax.jacrev(under)(w), rtol=1e-5)


def test_what_is_not_differentiated_costs_no_product():
    """The first layer's input needs no gradient, so its product has two, not three."""
    under = apply_to_function(lambda w, x: jnp.sum(x @ w), Policy.preset("bfloat16_mixed"))

    assert len(products(jax.grad(under), normal((4, 3), 0), normal((2, 4), 1))) == 2


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_activations_are_kept_for_the_backward_pass_in_the_compute_dtype(compute):
    w, x = normal((4, 3), 0), normal((2, 4), 1)
    under = apply_to_function(lambda w, x: jnp.tanh(x) @ w, Policy.parse(f"c={compute},o=f32"))

    _, pullback = jax.vjp(under, w, x)

    kept = {str(leaf.dtype) for leaf in jax.tree.leaves(pullback) if leaf.shape == (2, 4)}
    assert compute in kept


def test_a_result_keeps_the_dtype_that_the_model_expects():
    x = jnp.ones((2, 2), jnp.bfloat16)
    under = apply_to_function(lambda x: (x @ x, x), Policy.parse("p=bf16,c=f32,o=bf16"))

    assert [out.dtype for out in under(x)] == [jnp.bfloat16, jnp.bfloat16]
    assert products(under, x) == [("float32", "float32", "float32")]


def test_float64_products_need_64_bit_mode_and_then_happen():
    under = apply_to_function(lambda x: x @ x, Policy.parse("c=f64,o=f32"))
    x = jnp.full((1, 1), np.float32(1 + 2**-20))

    with pytest.raises(ValueError, match="compute=float64 needs 64-bit mode"):
        under(x)
    with jax.enable_x64(True):
        assert products(under, x) == [("float64", "float64", "float64")]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("jitted", [False, True])
def test_results_and_gradients_keep_the_subnormals_of_their_dtype(name, jitted):
    """Products of float16 came out zero below 2**-14, gradients among them: a reduced precision has no subnormals."""
    dtype, exponents = getattr(ml_dtypes, name, np.float16), np.arange(-30, 4)
    values = np.ldexp(np.array([1.0, 1.5, 1.00048828125, 1.9990234375])[:, None], exponents).reshape(1, -1)
    operand, one = jnp.asarray(values, dtype), jnp.ones((1, 1), dtype)
    multiply = apply_to_function(jnp.dot, Policy.parse(f"params={name},compute={name},output={name}"))

    def both(cotangent):
        out, pullback = jax.vjp(multiply, one, operand)
        return out, pullback(cotangent)[1]

    out, gradient = (jax.jit(both) if jitted else both)(operand)

    np.testing.assert_array_equal(np.asarray(out).view(np.uint16), np.asarray(operand).view(np.uint16))
    np.testing.assert_array_equal(np.asarray(gradient).view(np.uint16), np.asarray(operand).view(np.uint16))


def test_a_sum_is_rounded_to_float16_as_a_cast_rounds_it():
    """Ties between subnormals and overflow included, against numpy's cast of the exact sum."""
    rng = np.random.default_rng(0)
    lhs = (rng.integers(-7, 8, (4096, 2)) * 2.0 ** rng.integers(-14, 12, (4096, 1))).astype(np.float16)
    rhs = np.array([[2.0**-12], [2.0**-13]], np.float16)
    large = np.array([[2.0**5], [2.0**4]], np.float16)
    multiply = jax.jit(apply_to_function(jnp.dot, Policy.parse("params=float16,compute=float16,output=float16")))

    for right in (rhs, large):
        exact = lhs.astype(np.float64) @ right.astype(np.float64)
        with np.errstate(over="ignore"):
            expected = exact.astype(np.float16)
        np.testing.assert_array_equal(np.asarray(multiply(lhs, right)), expected)
    assert (abs(lhs.astype(np.float64) @ rhs) < 2.0**-14).mean() > 0.3
