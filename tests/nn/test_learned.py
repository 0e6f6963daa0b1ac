"""What FakeQuants have learned stays float32 wherever a policy stores parameters in another dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import freeze

import precision_lab as pl
from precision_lab.nn import FakeQuant, LinenFakeQuant
from precision_lab.nn.storage import bytes_under
from precision_lab.policy import Policy

X = jax.random.normal(jax.random.key(1), (6, 8))
STEP = np.float32(0.1003)  # no bfloat16: .1001 and .1006 are
STORED = "params=bfloat16,compute=float32,output=float32"


class NNXNet(nnx.Module):
    def __init__(self):
        self.fake = FakeQuant("int4,lsq", example=X)
        self.fake.scale[...] = jnp.full_like(self.fake.scale[...], STEP)
        self.head = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.fake(x, use_running_average=True)), self.fake.scale[...], self.head.kernel[...]


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        fake = LinenFakeQuant("int4,lsq", name="fake")
        head = linen.Dense(4, name="head")
        return head(fake(x, train=False)), fake.variables["params"]["scale"], head.variables["params"]["kernel"]


def network(kind):
    """Returns a model whose output has its step and its kernel, and its variables."""
    if kind == "nnx":
        return NNXNet(), None
    variables = LinenNet().init(jax.random.key(0), X)
    scale = variables["params"]["fake"]["scale"]
    variables["params"]["fake"]["scale"] = jnp.full_like(scale, STEP)
    return LinenNet(), freeze(variables) if kind == "frozen" else variables


@pytest.mark.parametrize("kind", ["nnx", "linen", "frozen"])
def test_sensitivity_stores_parameters_as_its_reference_and_learned_numbers_as_they_are(kind):
    model, params = network(kind)

    def losses(pick):
        loss = lambda out, _: pick(out).astype(jnp.float32).ravel()[0]  # noqa: E731
        return pl.sensitivity(model, ["w8a8"], [(X, 0)], params=params, reference=STORED, loss=loss).whole

    kernel = model.head.kernel[0, 0] if kind == "nnx" else params["params"]["head"]["kernel"][0, 0]
    assert [loss for _, loss in losses(lambda out: out[1])] == [STEP, STEP]
    assert losses(lambda out: out[2])[0][1] == kernel.astype(jnp.bfloat16) != kernel


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_observe_sees_what_was_rounded_by_the_step_as_it_was_learned(kind):
    model, params = network(kind)

    seen = pl.observe(model, *([] if params is None else [params]), X, policy=STORED, roles=["lhs"], rounding=False)

    steps = float(seen["head/kernel", "lhs"].amax) / STEP
    assert np.float32(round(steps)) * STEP == seen["head/kernel", "lhs"].amax


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_bytes_are_counted_of_what_stays_float32(kind):
    model, params = network(kind)

    found = bytes_under(model, Policy.parse(STORED), params, (X,), {})

    assert found == {"fake/scale": 4, "head/kernel": 2 * 32, "head/bias": 2 * 4}


def test_a_state_is_cast_but_for_learned_numbers():
    """As training does with the parameters that it starts from."""
    state = Policy.parse(STORED).cast_to_param(nnx.state(NNXNet(), nnx.Param))

    dtypes = {"/".join(path): leaf.dtype for path, leaf in nnx.to_flat_state(state)}
    assert dtypes == {"fake/scale": jnp.float32, "head/kernel": jnp.bfloat16, "head/bias": jnp.bfloat16}
    assert float(nnx.state(NNXNet())["fake"]["scale"][...].ravel()[0]) == STEP
