"""States as data: checkpoints, accessors, optax's maps over parameters in a state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from precision_lab.optim import (
    DynamicLossScale,
    LossScaleState,
    MasterWeightsState,
    current_loss_scale,
    loss_scaling,
    master_weights,
    scale_loss,
    skipped_steps,
    step_was_applied,
    sync,
)

PARAMS = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(3, jnp.float16)}


def stack(floor=4.0):
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(7)), optax.adamw(1e-3))
    return loss_scaling(master_weights(noisy), DynamicLossScale(init=8.0, min=floor))


def stepped(tx, grad=1.0):
    grads = jax.tree.map(lambda p: jnp.full_like(p, grad), PARAMS)
    return tx.update(grads, tx.init(PARAMS), PARAMS)[1]


def bits(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def test_orbax_gives_back_the_same_state(tmp_path):
    """Check 39."""
    tx = stack()
    state = stepped(tx)
    target = jax.eval_shape(tx.init, PARAMS)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target)

    assert type(restored) is LossScaleState
    assert type(restored.inner) is MasterWeightsState
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    pairs = list(zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True))
    assert all(a.dtype == b.dtype and bits(a) == bits(b) for a, b in pairs)
    assert any(jnp.issubdtype(a.dtype, jax.dtypes.prng_key) for a, _ in pairs)


def test_the_floor_holds_after_a_checkpoint(tmp_path):
    """Check 18."""
    tx = stack(floor=4.0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", stepped(tx, jnp.inf))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))

    _, state = tx.update(jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), PARAMS), state, PARAMS)

    assert float(state.loss_scale) == 4.0


def test_optax_finds_exactly_the_parameter_like_leaves():
    """Check 40."""
    tx = loss_scaling(master_weights(optax.adamw(1e-3)), DynamicLossScale())
    state = tx.init(PARAMS)

    marked = optax.tree_map_params(tx, lambda _: "param", state, transform_non_params=lambda _: "other")

    adam = marked.inner.inner[0]
    assert marked.inner.master == adam.mu == adam.nu == {"w": "param", "b": "param"}
    assert jax.tree.leaves(marked).count("param") == 6
    assert marked.loss_scale == marked.total == adam.count == "other"


def test_the_state_can_be_mapped_to_anything():
    """Check 40."""
    state = stack().init(PARAMS)

    assert jax.tree.leaves(jax.tree.map(lambda _: None, state)) == []
    specs = jax.tree.map(lambda _: PartitionSpec(), state)
    assert isinstance(specs, LossScaleState)


def test_accessors_find_the_state_by_type_wherever_it_stands():
    state = stepped(stack(), jnp.inf)
    wrapped = {"opt": (1, [state]), "loss_scale": jnp.zeros(3)}

    assert float(current_loss_scale(wrapped)) == 4.0
    assert int(skipped_steps(wrapped)) == 1
    assert not step_was_applied(wrapped)
    assert float(scale_loss(jnp.float16(2.0), wrapped)) == 8.0
    assert sync(PARAMS, wrapped)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("accessor", [current_loss_scale, skipped_steps, step_was_applied])
def test_accessors_say_what_is_missing_or_doubled(accessor):
    state = stack().init(PARAMS)

    with pytest.raises(ValueError, match=r"no LossScaleState: wrap the optimizer in loss_scaling"):
        accessor(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match=r"2 of LossScaleState, at \['a'\], \['b'\]"):
        accessor({"a": state, "b": state})


def test_an_integer_loss_is_refused():
    with pytest.raises(TypeError, match="floating loss, got int32"):
        scale_loss(jnp.int32(3), stack().init(PARAMS))


def test_a_float16_loss_does_not_overflow_when_scaled():
    state = loss_scaling(optax.sgd(1.0), DynamicLossScale()).init(PARAMS)

    assert float(scale_loss(jnp.float16(2.0), state)) == 131072.0
