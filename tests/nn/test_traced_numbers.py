"""Numbers of a policy's quantizers as data: a sweep over bit widths is one program, and each width what it is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from precision_lab.nn import apply_policy
from precision_lab.quant import quantizer_params, stack_quantizers

RNG = np.random.default_rng(0)
PARAMS = {"in": RNG.standard_normal((16, 12), np.float32), "out": RNG.standard_normal((12, 4), np.float32)}
X = RNG.standard_normal((8, 16), np.float32)
ACTIVATION = "activation=int8@token,execution=simulated"


def loss(params, x):
    return jnp.mean((jax.nn.relu(x @ params["in"]) @ params["out"]) ** 2)


def test_check_24_a_sweep_of_seven_widths_is_one_program_and_each_is_bit_for_bit_itself():
    traces = []

    @jax.jit
    def step(weight, params, x):
        traces.append(1)
        run = apply_policy(loss, f"weight=int8@channel,{ACTIVATION}", numbers={"weight": weight})
        return jax.value_and_grad(run)(params, x)

    for bits in range(2, 9):
        found = step(quantizer_params(f"int{bits}@channel"), PARAMS, X)

        alone = jax.jit(jax.value_and_grad(apply_policy(loss, f"weight=int{bits}@channel,{ACTIVATION}")))(PARAMS, X)
        jax.tree.map(np.testing.assert_array_equal, found, alone)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_check_25_a_batch_of_widths_is_the_loop():
    widths = [2, 3, 4, 6, 8]
    common, stacked = stack_quantizers(f"int{bits}@channel" for bits in widths)

    def run(weight):
        return jax.grad(apply_policy(loss, f"weight={common},{ACTIVATION}", numbers={"weight": weight}))(PARAMS, X)

    found = jax.jit(jax.vmap(run))(stacked)

    for n, bits in enumerate(widths):
        alone = jax.jit(run)(quantizer_params(f"int{bits}@channel"))
        jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-5), found, alone)


def test_numbers_reach_their_own_setting_alone_and_are_never_multiplied_as_codes():
    """execution=auto would take int8 codes of the policy's own quantizers."""
    policy = "weight=int8@channel,activation=int8@token,embedding=int8@channel"

    def fn(params, tokens):
        return jnp.take(params["in"], tokens, axis=0) @ params["out"]

    tokens = jnp.arange(5)
    found = apply_policy(fn, policy, numbers={"activation": quantizer_params("int3@token")})(PARAMS, tokens)
    table = apply_policy(fn, policy, numbers={"embedding": quantizer_params("int3@channel")})(PARAMS, tokens)

    expected = apply_policy(fn, policy.replace("int8@token", "int3@token"))(PARAMS, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    expected = apply_policy(fn, policy.replace("embedding=int8", "embedding=int3"))(PARAMS, tokens)
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["int8_training", "weight=int8@channel,backward=original", "w8a8,execution=native"])
def test_products_that_are_not_simulated_before_they_are_taken_refuse_numbers(policy):
    with pytest.raises(ValueError, match="numbers= are for quantizers that are simulated before their product"):
        apply_policy(loss, policy, numbers={"weight": quantizer_params("int4@channel")})(PARAMS, X)


def test_numbers_for_a_model_or_for_nothing_are_refused():
    with pytest.raises(TypeError, match="numbers= are for functions and NNX"):
        apply_policy(linen.Dense(2), "w4a16", numbers={})
    with pytest.raises(ValueError, match="numbers= are for the settings weight"):
        apply_policy(loss, "w4a16", numbers={"gradient": quantizer_params("int8")})
