"""Transforms of the parameters that a run begins with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from precision_lab import models
from precision_lab.models.config import DataSpec
from precision_lab.runner.known import metric_names
from precision_lab.training import check
from precision_lab.training.transforming import transformed
from precision_lab.training.transforms import TRANSFORMS
from tests.training.runs import config, run

BLOCKS = {"first": "blocks/*/up/kernel", "second": "blocks/*/down/kernel"}
NORMS = {"norm": "blocks/*/norm", "readers": "blocks/*/up/kernel"}
SPEC = DataSpec("next_token", (16,), 65)
TOKENS = np.random.default_rng(0).integers(0, 65, (64, 16))


def model():
    """Returns the model that most ablations use, and its parameters as nested dicts."""
    built = models.build(models.CharResMLPConfig(width=16), SPEC, 0)
    graph, params = nnx.split(built)
    return graph, nnx.to_pure_dict(params)


def logits(graph, params):
    return np.asarray(nnx.merge(graph, params)(TOKENS))


def after(params, *transforms, seed=0):
    return transformed(params, [TRANSFORMS.validate(one) for one in transforms], seed)


@pytest.mark.parametrize(
    ("transform", "tolerance"),
    [
        ({"kind": "relu_rescale", **BLOCKS, "spread": 4}, 0),
        ({"kind": "relu_rescale", **BLOCKS, "exponent": 20}, 0),
        ({"kind": "norm_outliers", **NORMS, "channels": 2, "factor": 64.0}, 0),
        ({"kind": "norm_outliers", **NORMS, "channels": 6, "factor": 200.0}, 1e-5),
        ({"kind": "equalize", **BLOCKS}, 1e-5),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_a_model_computes_in_float32_what_it_did(transform, tolerance):
    graph, params = model()

    changed, audit = after(params, transform)

    assert audit == {}
    before = logits(graph, params)
    assert np.abs(logits(graph, changed) - before).max() <= tolerance * np.abs(before).max()
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, changed)
    assert not all(jax.tree.leaves(same))


def test_exponents_are_drawn_for_each_unit_of_each_pair_from_the_seed():
    _, params = model()
    change = {"kind": "relu_rescale", **BLOCKS, "spread": 4}

    drawn = [after(params, change, seed=seed)[0] for seed in (0, 0, 1)]

    powers = [
        np.log2(np.asarray(one["blocks"][i]["up"]["kernel"] / params["blocks"][i]["up"]["kernel"])[0])
        for one in drawn
        for i in (0, 1)
    ]
    assert all(set(each) <= set(range(-4, 5)) and len(set(each)) > 4 for each in powers)
    np.testing.assert_array_equal(powers[0], powers[2])
    assert np.any(powers[0] != powers[1])
    assert np.any(powers[0] != powers[4])


def test_outliers_are_as_many_channels_of_each_norm_as_asked_for():
    _, params = model()

    changed, _ = after(params, {"kind": "norm_outliers", **NORMS, "channels": 3, "factor": 100.0})

    for i in (0, 1):
        gain = np.asarray(changed["blocks"][i]["norm"]["scale"])
        assert sorted(gain) == [1.0] * 13 + [100.0] * 3
    assert changed["norm"]["scale"] is params["norm"]["scale"]


def test_a_store_counts_what_the_format_loses_over_all_parameters():
    _, params = model()

    changed, audit = after(
        params,
        {"kind": "relu_rescale", **BLOCKS, "exponent": 22},
        {"kind": "store", "format": "float16", "clamp": True},
    )

    up = np.concatenate([np.ravel(params["blocks"][i]["up"]["kernel"]) for i in (0, 1)]).astype(np.float64)
    assert audit["overflow"] == np.sum(np.abs(up) * 2**22 >= 65520)
    down = np.concatenate([np.ravel(params["blocks"][i]["down"]["kernel"]) for i in (0, 1)]).astype(np.float64)
    assert audit["underflow"] == np.sum(np.abs(down) * 2**-22 <= 2**-25)
    assert audit["subnormal"] >= np.sum(np.abs(down) * 2**-22 > 2**-25)
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(changed)) == 65504


def test_a_run_begins_with_its_transforms_and_logs_the_audit():
    store = {"kind": "store", "format": "float8_e5m2"}
    plain, _ = run(train={"steps": 0})
    rescale = {"kind": "relu_rescale", "first": "layers/0/kernel", "second": "head/kernel", "spread": 3}

    same, _ = run(train={"steps": 0}, transforms=[rescale])
    stored, sink = run(train={"steps": 0}, transforms=[store])

    assert same.metrics == plain.metrics
    assert stored.metrics["eval/loss"] != plain.metrics["eval/loss"]
    assert set(sink.of("start")[0]) == {"step", "split", "overflow", "underflow", "subnormal"}
    assert "start/overflow" in metric_names(config(transforms=[store]))
    assert "start/overflow" not in metric_names(config(transforms=[rescale]))


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"kind": "relu_rescale", "first": "nowhere", "second": "head/kernel"}, "'nowhere' matches no parameter"),
        ({"kind": "equalize", "first": "**/kernel", "second": "head/kernel"}, "matches 2 parameters, .* not pairs"),
        ({"kind": "equalize", "first": "head/kernel", "second": "layers/0/kernel"}, "expected kernels"),
        ({"kind": "norm_outliers", "norm": "head", "readers": "head/kernel", "channels": 1, "factor": 2.0}, "no param"),
    ],
)
def test_a_transform_that_does_not_fit_is_refused_before_the_run(transform, words):
    with pytest.raises(ValueError, match=rf"transforms\.0 \({transform['kind']}\): .*{words}"):
        check(config(transforms=[transform]))


def test_too_many_channels_and_formats_without_a_range_are_refused():
    _, params = model()

    with pytest.raises(ValueError, match="channels is 17, but blocks/0/norm/scale has 16"):
        after(params, {"kind": "norm_outliers", **NORMS, "channels": 17, "factor": 2.0})
    with pytest.raises(ValueError, match="int8 is of kind int, which needs a scale"):
        config(transforms=[{"kind": "store", "format": "int8"}])
