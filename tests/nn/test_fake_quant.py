"""FakeQuant in NNX and in Linen: the same numbers as the functions behind them, and at home in either framework."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.nn import FakeQuant, LinenFakeQuant, QuantParam, QuantStat
from precision_lab.quant import fake_quantize, init_state, known_scales, quantize_with_state

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32))
SPECS = ["int4@channel,lsq", "uint4,lsq+", "uint4,pact", "int8,ema", "int8@channel,affine,ema", "int4@channel"]


class Net(nnx.Module):
    """A linear layer with a learned step for its weights, and a running range for its input, as people write it."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 3, rngs=rngs)
        self.weight = FakeQuant("int4@channel,lsq", axis=0, example=self.linear.kernel[...])
        self.input = FakeQuant("int8,ema", example=jax.ShapeDtypeStruct((1, 6), jnp.float32))

    def __call__(self, x):
        return self.input(x) @ self.weight(self.linear.kernel[...]) + self.linear.bias[...]


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        kernel = self.param("kernel", linen.initializers.lecun_normal(), (6, 3))
        kernel = LinenFakeQuant("int4@channel,lsq", axis=0, name="weight")(kernel, train)
        return LinenFakeQuant("int8,ema", name="input")(x, train) @ kernel


@pytest.mark.parametrize("spec", SPECS)
def test_both_are_the_functions_behind_them(spec):
    """Two steps of training and one of evaluation."""
    options = {"delay": 1} if "ema" in spec else {}
    module, twin = FakeQuant(spec, axis=0, **options), LinenFakeQuant(spec, axis=0, **options)
    state, variables = init_state(spec, X, axis=0), twin.init(jax.random.key(0), X, train=True)

    for batch, train in ((X, True), (2 * X, True), (3 * X, False)):
        expected, state = quantize_with_state(batch, spec, state, axis=0, train=train, **options)
        module.set_attributes(use_running_average=not train)
        value, changed = twin.apply(variables, batch, train=train, mutable=["quant_stats"])
        variables = {**variables, **changed}

        np.testing.assert_array_equal(module(batch), expected)
        np.testing.assert_array_equal(value, expected)


def test_variables_have_kinds_of_their_own():
    net = Net(nnx.Rngs(0))
    variables = LinenNet().init(jax.random.key(0), X, train=True)

    assert [path for path, _ in nnx.to_flat_state(nnx.state(net, QuantParam))] == [("weight", "scale")]
    assert ("input", "high") in dict(nnx.to_flat_state(nnx.state(net, QuantStat)))
    assert ("weight", "scale") in dict(nnx.to_flat_state(nnx.state(net, nnx.Param)))
    assert variables["params"]["weight"]["scale"].shape == (1, 3)
    assert set(variables["quant_stats"]["input"]) >= {"low", "high", "scale", "steps"}
    assert int(variables["quant_stats"]["input"]["updates"]) == 0  # what init saw is no batch


def test_train_and_eval_are_those_of_the_framework():
    net = Net(nnx.Rngs(0))
    net.train()
    net(X)
    net.eval()
    net(100 * X)
    model = LinenNet()
    variables = model.init(jax.random.key(0), X, train=False)

    assert float(net.input.high[0, 0]) == float(X.max())
    assert int(net.weight.steps[...]) == 1
    model.apply(variables, X, train=False)
    with pytest.raises(Exception, match="quant_stats"):
        model.apply(variables, X, train=True)
    with pytest.raises(ValueError, match="needs use_running_average"):
        FakeQuant("int8,ema", use_running_average=None)(X)


def test_a_training_step_of_nnx_moves_steps_and_ranges():
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
    before = net.weight.scale[...]
    kernel = net.linear.kernel[...]

    @nnx.jit
    def step(net, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - 1) ** 2))(net)
        optimizer.update(net, grads)
        return loss

    def by_hand(scale):
        x = fake_quantize(X, "int8", axis=0)  # The first range is that of the batch.
        out = x @ fake_quantize(kernel, "int4@channel,lsq", axis=0, scale=scale) + 0
        return jnp.mean((out - 1) ** 2)

    step(net, optimizer, X)

    np.testing.assert_allclose(net.weight.scale[...], before - 0.1 * jax.grad(by_hand)(before), rtol=1e-5, atol=1e-7)
    assert float(net.input.high[0, 0]) == float(X.max())


def test_a_training_step_of_linen_has_gradients_of_its_steps():
    model = LinenNet()
    variables = model.init(jax.random.key(0), X, train=True)

    @jax.jit
    def gradients(variables):
        def loss(params):
            given = {**variables, "params": params}
            out, changed = model.apply(given, X, train=True, mutable=["quant_stats"])
            return jnp.mean((out - 1) ** 2), changed

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, changed = gradients(variables)

    assert (np.asarray(grads["weight"]["scale"]) != 0).all()
    assert float(changed["quant_stats"]["input"]["high"][0, 0]) == float(X.max())


def test_variables_are_made_in_the_first_call_eager_or_jitted():
    eager, jitted = (FakeQuant("int4,lsq") for _ in range(2))
    eager(X)

    nnx.jit(lambda module, x: module(x))(jitted, X)

    np.testing.assert_array_equal(jitted.scale[...], eager.scale[...])
    np.testing.assert_allclose(eager.scale[0, 0], 2 * np.abs(X).mean() / np.sqrt(7), rtol=1e-6)


def test_layers_scan_and_batches_vmap():
    @nnx.vmap
    def stacked(key):
        return Block(nnx.Rngs(key))

    class Block(nnx.Module):
        def __init__(self, rngs):
            kernel = jax.random.normal(rngs.params(), (6, 6))
            self.kernel = nnx.Param(kernel)
            self.weight = FakeQuant("int4,lsq", example=kernel)
            self.input = FakeQuant("int8,ema", example=jax.ShapeDtypeStruct((1, 1), jnp.float32))

        def __call__(self, x):
            return jnp.tanh(self.input(x) @ self.weight(self.kernel[...]))

    blocks = stacked(jax.random.split(jax.random.key(0), 3))

    out = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, blocks)

    x = X
    for i, (kernel, scale) in enumerate(zip(blocks.kernel[...], blocks.weight.scale[...], strict=True)):
        assert float(blocks.input.high[i, 0, 0]) == pytest.approx(float(x.max()), rel=1e-5)
        x = jnp.tanh(fake_quantize(x, "int8") @ fake_quantize(kernel, "int4", scale=scale))
    np.testing.assert_allclose(out, x, atol=0.02)  # an input at a tie may round the other way


def test_linen_layers_scan():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return jnp.tanh(LinenFakeQuant("int8,ema")(x, True)), None

    stack = linen.scan(Block, variable_axes={"params": 0, "quant_stats": 0}, split_rngs={"params": True}, length=3)()
    variables = stack.init(jax.random.key(0), X, None)

    (_, _), changed = stack.apply(variables, X, None, mutable=["quant_stats"])

    high = changed["quant_stats"]["LinenFakeQuant_0"]["high"]
    assert high.shape == (3, 1, 1)
    assert float(high[0, 0, 0]) == float(X.max())
    assert float(high[1, 0, 0]) == pytest.approx(np.tanh(float(X.max())), rel=1e-2)


def test_state_is_checkpointed_and_restored(tmp_path):
    net, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    net(X)
    net(3 * X)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(net))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / "state", nnx.state(other)))

    np.testing.assert_array_equal(other(X), net(X))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), nnx.state(other))


def test_the_state_of_a_module_says_what_to_deploy():
    net = Net(nnx.Rngs(0))
    kernel = net.linear.kernel[...]

    known = known_scales("int4@channel,lsq", net.weight.state)

    np.testing.assert_array_equal(net.weight(kernel), fake_quantize(kernel, "int4@channel,lsq", axis=0, **known))


def test_a_dynamic_quantizer_has_no_variables():
    module, twin = FakeQuant("int4@channel", axis=0), LinenFakeQuant("int4@channel", axis=0)
    module(X)

    assert not nnx.to_flat_state(nnx.state(module))
    assert twin.init(jax.random.key(0), X, train=True) == {}


@pytest.mark.parametrize("spec", ["uint4,lsq+", "uint4,pact", "int4@channel,lsq"])
def test_learned_numbers_stay_float32_under_a_policy_that_stores_parameters_in_less(spec):
    """Linen's were cast as if they were weights: a step of 1e-3 that learns by 1e-6 would never move."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            kernel = self.param("kernel", linen.initializers.lecun_normal(), (6, 3))
            scale = self.param("scale", linen.initializers.ones, (3,))
            return LinenFakeQuant(spec, axis=1, name="input")(x, train=False) @ kernel * scale

    plain = Net().init(jax.random.key(0), X)
    module = pl.apply_policy(Net(), "params=bfloat16")

    for variables in (module.init(jax.random.key(0), X), module.init_with_output(jax.random.key(0), X)[1]):
        own, given = variables["params"], plain["params"]
        jax.tree.map(np.testing.assert_array_equal, own["input"], given["input"])
        assert {leaf.dtype.name for leaf in jax.tree.leaves(own["input"])} == {"float32"}
        assert (own["kernel"].dtype, own["scale"].dtype) == (jnp.bfloat16, jnp.bfloat16)
    _, converted = pl.convert(Net(), "params=bfloat16,weight=int8@channel", X, params=plain)
    jax.tree.map(np.testing.assert_array_equal, converted["params"]["input"], plain["params"]["input"])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"quantizer": "int8,lsq,ema"}, ValueError, "not both"),
        ({"quantizer": "int8", "start": "mse"}, ValueError, "learns nothing"),
        ({"quantizer": "int8", "freeze": 3}, ValueError, "nothing to freeze"),
        ({"quantizer": "int8@channel,ema"}, ValueError, "needs axis="),
        ({"quantizer": "int9000"}, ValueError, "int9000"),
    ],
)
def test_what_cannot_be_is_refused_by_both(options, error, says):
    with pytest.raises(error, match=says):
        FakeQuant(**options)(X)
    with pytest.raises(error, match=says):
        LinenFakeQuant(**options).init(jax.random.key(0), X, train=True)
