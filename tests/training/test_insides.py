"""What a run shows inside, against numpy on the checkpoint's own numbers."""

import jax
import numpy as np
import pytest

from precision_lab import data
from precision_lab.policy import Policy
from precision_lab.training import RunConfig, train
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.insides import _described, _format_of, look_inside
from precision_lab.training.program import program_for


class Silent:
    """A sink that keeps nothing."""

    def restart(self, step):
        """Does nothing."""

    def write(self, row):
        """Does nothing."""


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run in float16 whose gradients underflow: its config, its folder, what was found, and its parameters."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig.model_validate(
        {
            "model": {"kind": "mlp", "hidden": [16]},
            "data": {"kind": "digits", "batch": 32},
            "optim": {"kind": "sgd", "lr": 0.01},
            "policy": "params=float16,compute=float16,output=float32",
            "master_weights": True,
            "train": {"steps": 3, "loss_shift": 24},
        }
    )
    train(config, checkpoint_dir=folder, sink=Silent())
    dataset = data.load(config.data)
    with Checkpoints(folder, config) as checkpoints:
        state = checkpoints.restore(program_for(config, dataset.spec).state_shapes).state
    return config, dataset, look_inside(config, folder), jax.device_get(state.params)


def test_exponents_of_weights_are_those_of_the_checkpoint(half):
    _, _, found, params = half

    values = np.abs(np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(params)]))
    expected = {}
    for value in values[values > 0]:
        exponent = int(np.floor(np.log2(value)))
        expected[str(exponent)] = expected.get(str(exponent), 0) + 1
    weights = found["tensors"]["weights"]
    assert weights["binades"] == expected
    assert weights["zero"] == np.mean(values == 0)
    assert (weights["format"], weights["window"]) == ("float16", [-24, -14, 15])


def test_gradients_below_the_smallest_number_are_zero(half):
    assert half[2]["tensors"]["gradients"]["zero"] > 0.99


def test_the_error_of_the_first_product_is_that_of_rounding_its_operands(half):
    """float32 products of operands rounded to float16 against exact ones, in float64."""
    _, dataset, found, params = half
    x = np.asarray(dataset.eval.take(np.arange(64))["inputs"], np.float64).reshape(64, -1)
    first = params["layers"][0]["kernel"]
    kernel = np.asarray(first["value"] if isinstance(first, dict) else first, np.float64)

    exact = x @ kernel
    rounded = x.astype(np.float16).astype(np.float64) @ kernel
    noise = np.sum((rounded - exact) ** 2)
    site = next(row for row in found["sites"] if row["site"] == "layers/0/kernel")
    # Sums in float32 are off by 1e-7 of them, which is 1e-3 of a noise 74 dB below: a hundredth of a dB.
    assert site["sqnr_db"] == pytest.approx(10 * np.log10(np.sum(exact**2) / noise), abs=0.01)


def test_a_run_without_a_checkpoint_shows_nothing(half, tmp_path):
    assert look_inside(half[0], tmp_path / "none") is None


@pytest.mark.parametrize(
    "policy", ["weight=int4@channel", "nf4", "mxfp4", "weight=float8_e4m3fn@tensor", "w8a8", "bitnet_b158"]
)
def test_the_window_of_a_scaled_format_ends_where_the_weights_do(policy):
    fmt, scaled = _format_of(Policy.parse(policy), "weight")
    values = np.float32([0.3, -2.5, 0.01])

    found = _described({"w": values}, (fmt, scaled))

    lowest, normal, top = found["window"]
    assert scaled
    assert lowest <= normal <= top == 1  # 2 <= 2.5 < 4
    assert found["above"] == 0
    assert found["below"] == np.mean(abs(values) < 2.0**lowest)


def test_adapters_beside_frozen_weights_can_be_looked_into(tmp_path):
    config = RunConfig.model_validate(
        {
            "model": {"kind": "mlp", "hidden": [8]},
            "data": {"kind": "digits", "batch": 32},
            "optim": {"kind": "sgd", "lr": 0.01},
            "policy": "weight=int8@channel",
            "lora": {"rank": 2},
            "train": {"steps": 1},
        }
    )
    train(config, checkpoint_dir=tmp_path, sink=Silent())

    found = look_inside(config, tmp_path)

    adapters = 2 * (64 + 8) + 2 * (8 + 10)
    gradients = found["tensors"]["gradients"]
    assert sum(gradients["binades"].values()) + gradients["zero"] * adapters == adapters
    assert found["sites"] == []
