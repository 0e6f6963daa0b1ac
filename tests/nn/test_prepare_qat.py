"""Models whose quantizers learn: variables of Flax, trained, saved and converted as any other."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.nn import QuantParam, QuantStat
from precision_lab.quant import QTensor

POLICY = "weight=int4@channel,lsq,activation=int8@tensor,ema"
X = np.random.default_rng(0).standard_normal((8, 16), np.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.down = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.norm(self.up(x))))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(12)(x))
        return linen.Dense(2)(linen.relu(x))


class Mixed(nnx.Module):
    """A convolution, heads that are kept apart, a transposed kernel and a table."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), feature_group_count=1, rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs)
        self.table = nnx.Embed(5, 6, rngs=rngs)
        self.head = nnx.Param(rngs.params.normal((7, 6)))

    def __call__(self, x, labels):
        x = self.out(self.heads(self.conv(x)))
        return (x + self.table(labels)) @ self.head.T


class Stack(nnx.Module):
    """Layers of one class, stacked and scanned."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.Linear(16, 16, rngs=rngs)

        self.layers = layers(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jnp.tanh(layer(x))

        return run(self.layers, x)


@nnx.jit
def train_step(model, optimizer, x):
    value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
    optimizer.update(model, grads)
    return value


def trained(net, *args, policy=POLICY, steps=3, **options):
    model = pl.prepare_qat(net, policy, *args, **options)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for _ in range(steps):
        train_step(model, optimizer, *args)
    return model


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@nnx.jit
def call(model, *args):
    return model(*args)


def init(model):
    return jax.jit(lambda key: model.init(key, X, train=True))(jax.random.key(0))


def values_of(model):
    """Returns the numbers that the variables of a model hold now, by path."""
    return {"/".join(map(str, path)): np.array(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def packed_paths(tree):
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return [jax.tree_util.keystr(path) for path, leaf in leaves if isinstance(leaf, QTensor)]


def test_variables_have_kinds_of_their_own_and_stay_float32():
    """Parameters in bfloat16 do not take the numbers of quantizers with them, which would be off by 2**-9."""
    net = Net(nnx.Rngs(0))
    model = pl.prepare_qat(net, f"params=bfloat16,{POLICY}", X)
    explicit = pl.apply_policy(nnx.Sequential(pl.nn.FakeQuant("int4,lsq", example=X)), "params=bfloat16")

    learned, running = nnx.state(model, QuantParam), nnx.state(model, QuantStat)
    paths = {path for path, _ in nnx.to_flat_state(learned)}
    assert paths == {("quantizer_states", "sites", f"{name}/kernel", "rhs", "scale") for name in ("up", "down")}
    assert {leaf.dtype for leaf in jax.tree.leaves(learned)} == {jnp.dtype("float32")}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(running)} == {"float32", "int32"}
    assert model.up.kernel.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(explicit, QuantParam))} == {jnp.dtype("float32")}
    assert not hasattr(net, "quantizer_states")
    assert isinstance(model, Net)


def test_a_training_step_is_that_of_a_function():
    """Without the batch norm, whose statistics a function of parameters has no place for."""
    net = nnx.Sequential(nnx.Linear(16, 12, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(12, 2, rngs=nnx.Rngs(1)))
    params = values_of(net)

    def loss(p, x):
        x = jax.nn.relu(x @ p["layers/0/kernel"] + p["layers/0/bias"])
        return jnp.mean((x @ p["layers/2/kernel"] + p["layers/2/bias"] - 1) ** 2)

    qat = pl.QAT(POLICY)
    state, step = qat.init(loss, params, X), jax.jit(qat.value_and_grad(loss))
    for _ in range(3):
        (_, grads), state = step(params, state, X)
        moving = jax.tree.map(lambda p, g: p - 0.1 * g, (params, state["learned"]), grads)
        params, state = moving[0], state | {"learned": moving[1]}

    model = trained(net, X)

    found = model.quantizer_states.state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, state)
    np.testing.assert_allclose(model.layers[0].kernel[...], params["layers/0/kernel"], rtol=1e-4, atol=1e-6)


def test_evaluation_moves_nothing_and_training_moves_ranges_with_the_batch_norm():
    model = trained(Net(nnx.Rngs(0)), X)
    model.eval()
    before = values_of(model)

    call(model, 100 * X)
    evaluated = values_of(model)
    model.train()
    call(model, 100 * X)

    assert_equal(evaluated, before)
    changed = {path for path, value in values_of(model).items() if not np.array_equal(value, before[path])}
    sites = "quantizer_states/sites/up/kernel"
    assert {f"{sites}/lhs/high", f"{sites}/lhs/scale", f"{sites}/rhs/steps", "norm/mean"} <= changed
    assert f"{sites}/rhs/scale" not in changed


def test_a_trained_model_is_split_merged_pickled_and_restored(tmp_path):
    schedule = {"delay": 1, "freeze": 2, "momentum": 0.5}
    model = trained(Net(nnx.Rngs(0)), X, **schedule)
    model.eval()
    expected, (graphdef, state) = call(model, X), nnx.split(model)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(state))
        restored = checkpointer.restore(tmp_path / "model", nnx.to_pure_dict(state))
    fresh = nnx.state(pl.prepare_qat(Net(nnx.Rngs(1)), POLICY, X, **schedule))
    nnx.replace_by_pure_dict(fresh, restored)

    assert_equal(call(nnx.merge(graphdef, fresh), X), expected)
    again = pickle.loads(pickle.dumps(model))
    assert_equal(call(again, X), expected)
    assert type(again).precision_qat == pl.QAT(POLICY, 1, 2, 0.5)


def test_other_policies_drop_the_states():
    model = trained(Net(nnx.Rngs(0)), X)

    plain = pl.apply_policy(model, "w8a8")

    assert not hasattr(plain, "quantizer_states")
    assert call(plain, X).shape == (8, 2)
    with pytest.raises(ValueError, match="no state that could hold it"):
        pl.apply_policy(model, POLICY)(X)


def test_linen_keeps_what_is_learned_with_the_params_and_ranges_with_the_statistics():
    model = pl.prepare_qat(LinenNet(), f"params=bfloat16,{POLICY}")
    variables = init(model)
    scale = variables["params"]["quantizer_states"]["Dense_0/kernel"]["rhs"]["scale"]

    @jax.jit
    def step(variables):
        def loss(params):
            out, changed = model.apply(
                variables | {"params": params}, X, train=True, mutable=["batch_stats", "quant_stats"]
            )
            return jnp.mean((out - 1) ** 2), changed

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, changed = step(variables)

    assert scale.shape == (1, 12)
    assert scale.dtype == jnp.float32
    assert variables["params"]["Dense_0"]["kernel"].dtype == jnp.bfloat16
    assert (np.asarray(grads["quantizer_states"]["Dense_1/kernel"]["rhs"]["scale"]) != 0).all()
    stats = changed["quant_stats"]["quantizer_states"]["Dense_0/kernel"]["lhs"]
    assert float(stats["high"][0, 0]) == X.max()
    assert "mean" in changed["batch_stats"]["BatchNorm_0"]
    again = pickle.loads(pickle.dumps(model))
    after = [jax.jit(lambda v, one=one: one.apply(v, X, train=False))(variables | changed) for one in (again, model)]
    assert_equal(*after)


def test_linen_and_nnx_are_one_thing():
    net = nnx.Linear(16, 12, rngs=nnx.Rngs(0))
    dense = pl.prepare_qat(linen.Dense(12), POLICY)
    variables = dense.init(jax.random.key(0), X)
    variables["params"] |= {"kernel": net.kernel[...], "bias": net.bias[...]}
    model = pl.prepare_qat(net, POLICY, X)
    variables["params"]["quantizer_states"]["kernel"] = model.quantizer_states.state["learned"]["kernel"]

    out, changed = jax.jit(lambda v: dense.apply(v, 2 * X, mutable=["quant_stats"]))(variables)

    np.testing.assert_allclose(out, call(model, 2 * X), rtol=1e-6, atol=1e-6)
    assert_equal(changed["quant_stats"]["quantizer_states"], model.quantizer_states.state["running"])


@pytest.mark.parametrize(
    ("net", "args", "policy", "packed"),
    [
        (Net, (X,), POLICY, 2),
        (Net, (X,), "weight=int4@group4,lsq,activation=uint8@tensor,lsq+", 2),
        (Net, (X,), "weight=int4@channel,lsq+,activation=int8@tensor,affine,ema", 2),
        (Stack, (X,), POLICY, 1),
        (
            Mixed,
            (np.random.default_rng(1).standard_normal((2, 4, 4, 3), np.float32), np.full((2, 4, 4), 3, np.int32)),
            f"{POLICY},embedding=int4@channel,lsq",
            5,
        ),
    ],
    ids=["both in codes", "groups and an offset", "offset and zero point", "scanned layers", "every layout"],
)
def test_a_converted_model_computes_what_the_trained_one_does(net, args, policy, packed):
    model = pl.prepare_qat(net(nnx.Rngs(0)), policy, *args)
    for n in range(2):
        call(model, (1 + n) * args[0], *args[1:])
    learned = nnx.state(model, QuantParam)
    nnx.update(model, jax.tree.map(lambda x: x * jnp.linspace(0.8, 1.3, x.size).reshape(x.shape), learned))
    model.eval()

    converted = pl.convert(model, None, *args)

    expected = call(model, *args)
    np.testing.assert_allclose(call(converted, *args), expected, rtol=0, atol=3e-6 * float(jnp.abs(expected).max()))
    assert len(packed_paths(nnx.state(converted))) == packed
    assert not hasattr(converted, "quantizer_states")
    assert np.abs(call(pl.apply_policy(model, "float32"), *args) - expected).max() > 1e-3


def test_a_linen_model_is_converted_too():
    model = pl.prepare_qat(LinenNet(), POLICY)
    variables = init(model)
    _, changed = jax.jit(lambda v: model.apply(v, X, train=True, mutable=["batch_stats", "quant_stats"]))(variables)
    variables |= changed

    module, stored = pl.convert(model, None, X, train=False, params=variables)

    found, expected = (
        jax.jit(lambda v, one=one: one.apply(v, X, train=False))(given)
        for one, given in ((module, stored), (model, variables))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert set(stored["params"]) == {"Dense_0", "Dense_1", "BatchNorm_0"}
    assert len(packed_paths(stored)) == 2


def test_a_parameter_with_two_learned_scales_stays_as_it_is():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            return self.layer(nnx.relu(self.layer(x)))

    model = pl.prepare_qat(Twice(nnx.Rngs(0)), POLICY, X)
    model(X)
    scales = model.quantizer_states.sites["layer/kernel"]["rhs"]
    scales["scale"][...] = 2 * scales["scale"][...]
    model.eval()

    with pytest.warns(UserWarning, match="a scale of its own at each of its sites"):
        converted = pl.convert(model, None, X)

    np.testing.assert_allclose(call(converted, X), call(model, X), rtol=1e-5, atol=1e-5)


def test_what_is_not_ready_is_not_converted():
    model = pl.prepare_qat(Net(nnx.Rngs(0)), POLICY, X, delay=2)
    with pytest.raises(ValueError, match="after 0 steps the model is not quantized yet"):
        pl.convert(model, None, X)
    with pytest.raises(ValueError, match="was trained under"):
        pl.convert(model, "w8a8", X)
    with pytest.raises(TypeError, match="needs an example"):
        pl.convert(model)
    with pytest.raises(ValueError, match="has no range yet"):
        pl.convert(pl.prepare_qat(Net(nnx.Rngs(0)), POLICY, X), None, X)


def test_what_cannot_be_prepared_is_refused():
    with pytest.raises(TypeError, match="needs data to start from"):
        pl.prepare_qat(Net(nnx.Rngs(0)), POLICY)
    with pytest.raises(TypeError, match="takes no data"):
        pl.prepare_qat(LinenNet(), POLICY, X)
    with pytest.raises(TypeError, match=r"there is pl\.QAT"):
        pl.prepare_qat(lambda p, x: x @ p, POLICY, X)
    model = pl.prepare_qat(LinenNet(), POLICY)
    with pytest.raises(ValueError, match="lazy_init has not"):
        model.lazy_init(jax.random.key(0), jax.ShapeDtypeStruct((8, 16), jnp.float32), train=True)
    with pytest.raises(ValueError, match="make them by init"):
        model.apply(LinenNet().init(jax.random.key(0), X, train=True), X, train=False)
