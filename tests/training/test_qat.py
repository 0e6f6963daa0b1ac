"""Runs whose quantizers learn: what they learn trains, is saved and goes on with the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import precision_lab as pl
from precision_lab import data, models
from precision_lab.nn import QuantParam
from precision_lab.runner.known import metric_names
from precision_lab.training import check, train
from precision_lab.training.beginning import beginning
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.insides import look_inside
from precision_lab.training.looking import compare_policies
from precision_lab.training.program import program_for
from precision_lab.training.size import bits_per_parameter
from tests.training.runs import MemorySink, config, run

POLICY = "weight=int4@channel,lsq,activation=uint4@tensor,pact,percentile95"
QAT = {"policy": POLICY, "qat": {"delay": 3, "freeze": 12}}
SPEC = config().data.spec()


def restored(run_config, folder):
    with Checkpoints(folder, run_config) as checkpoints:
        return checkpoints.restore(program_for(run_config, SPEC).state_shapes).state


def learned(state):
    """Returns what each quantizer of a train state has learned, by site, operand and name."""
    sites = state.params["quantizer_states"]["sites"]
    return {
        (site, role, name): np.asarray(x)
        for site, roles in sites.items()
        for role, numbers in roles.items()
        for name, x in numbers.items()
    }


def test_a_run_trains_as_a_prepared_model_in_a_loop_of_ones_own(tmp_path):
    """The batches, the start from the first of them, and plain optax; to the rounding of a program of its own."""
    changes = {"policy": POLICY, "train": {"steps": 4, "log_every": 1}}
    one = config(**changes)
    batches = data.batches(data.load(one.data), one.data, one.seed)
    model = pl.prepare_qat(models.build(one.model, SPEC, one.seed), POLICY, batches[0]["inputs"])
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(batch["inputs"]), batch["targets"]).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, batches[n])) for n in range(4)]
    _, sink = run(folder=tmp_path, **changes)

    np.testing.assert_allclose([row["loss"] for row in sink.of("train").values()], losses, rtol=1e-4)
    own = {tuple(map(str, path[2:])): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, QuantParam))}
    found = learned(restored(one, tmp_path))
    assert found.keys() == own.keys()
    assert {name for *_, name in found} == {"scale", "alpha"}
    for key, array in found.items():
        np.testing.assert_allclose(array, own[key][...], rtol=1e-3)


@pytest.mark.parametrize("stop", [3, 11, 12])
def test_a_run_that_goes_on_learns_as_one_that_was_not_stopped(tmp_path, stop):
    """Before, at and after the end of the delay and the freeze: bit for bit, in metrics and in what was saved."""
    whole, sink = run(folder=tmp_path / "whole", **QAT)
    steps = []

    def on_step(step, _):
        steps.append(step)

    folder, halves = tmp_path / "halves", MemorySink()
    half = train(
        config(**QAT), checkpoint_dir=folder, sink=halves, on_step=on_step, should_stop=lambda: steps[-1] == stop
    )
    rest = train(config(**QAT), checkpoint_dir=folder, sink=halves)

    assert (half.status, half.step) == ("stopped", stop)
    assert (rest.status, rest.metrics) == ("done", whole.metrics)
    assert halves.rows == sink.rows
    both = [restored(config(**QAT), each) for each in (tmp_path / "whole", folder)]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_clips_and_steps_learn_between_the_delay_and_the_freeze(tmp_path):
    states = []
    for steps in (3, 12, 20):
        changes = QAT | {"train": {"steps": steps}}
        run(folder=tmp_path / str(steps), **changes)
        states.append(restored(config(**changes), tmp_path / str(steps)))

    start = beginning(config(**QAT), program_for(config(**QAT), SPEC), SPEC, None, first_batches()).state
    for key, array in learned(start).items():
        np.testing.assert_array_equal(learned(states[0])[key], array)
        assert np.any(learned(states[1])[key] != array)
    running = states[2].model_state["quantizer_states"]["sites"]
    for (site, role, name), array in learned(states[1]).items():
        np.testing.assert_array_equal(running[site][role][f"frozen_{name}"], array)
    assert np.any(states[2].params["head"]["kernel"] != states[1].params["head"]["kernel"])


def first_batches():
    one = config()
    return data.batches(data.load(one.data), one.data, one.seed)


def test_a_run_begins_from_the_weights_of_another_and_its_quantizers_from_these(tmp_path):
    """As one trains in float32 first; a third run begins from the second's weights, without its quantizers."""
    first = config(train={"steps": 5})
    run(folder=tmp_path / "first", train={"steps": 5})
    begun = config(policy=POLICY, start={"run": first.model_dump()}, train={"steps": 5})
    state = beginning(begun, program_for(begun, SPEC), SPEC, tmp_path / "first", first_batches()).state
    train(begun, checkpoint_dir=tmp_path / "second", sink=MemorySink(), start_from=tmp_path / "first")
    third = config(policy="w8a8", start={"run": begun.model_dump()}, train={"steps": 0})

    result = train(third, checkpoint_dir=None, sink=MemorySink(), start_from=tmp_path / "second")

    kernel = np.asarray(restored(first, tmp_path / "first").params["head"]["kernel"], np.float64)
    expected = 2 * np.abs(kernel).mean(0, keepdims=True) / np.sqrt(7)
    np.testing.assert_allclose(learned(state)["head/kernel", "rhs", "scale"], expected, rtol=1e-5)
    assert result.metrics["eval/loss"] < 2.3


def test_other_policies_see_the_parameters_alone(tmp_path):
    """The shadow of a quantized run: its weights in float32, without scales; and the views of a finished run."""
    result, _ = run(folder=tmp_path, evals={"shadow": "float32", "eight": "w8a8"}, **QAT)
    one = config(evals={"shadow": "float32", "eight": "w8a8"}, **QAT)
    state = restored(one, tmp_path)

    params = {name: value for name, value in state.params.items() if name != "quantizer_states"}
    x, hidden = data.load(one.data).eval.take(np.arange(100)), params["layers"][0]
    logits = jax.nn.relu(x["inputs"].reshape(100, -1) @ hidden["kernel"] + hidden["bias"]) @ params["head"]["kernel"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits + params["head"]["bias"], x["targets"])
    assert result.metrics["eval_shadow/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert result.metrics["eval/loss"] != result.metrics["eval_shadow/loss"]
    assert {name for name in result.metrics if name.startswith("weights")} == {"weights_eight/relative_mse"}
    assert set(result.metrics) <= metric_names(one)
    inside = look_inside(one, tmp_path)
    values = sum(inside["tensors"]["weights"]["binades"].values())
    assert inside["sites"] == []
    assert values <= sum(x.size for x in jax.tree.leaves(params))
    assert [site.site for site in compare_policies(one, ["float32", "w8a8"], tmp_path).comparison.rows][-1] == "output"
    with pytest.raises(ValueError, match="say what to hold against the reference without lsq"):
        compare_policies(one, ["float32", POLICY], tmp_path)


@pytest.mark.parametrize("estimator", ["", ",lsq"])
def test_bits_count_learned_scales_as_others(estimator):
    """4 bits and a float32 scale for each output, and biases in float32, worked by hand."""
    bits = bits_per_parameter(config(policy=f"weight=int4@channel{estimator}"))

    inside, outs = 64 * 16 + 16 * 10, 16 + 10
    assert bits == (4 * inside + 32 * outs + 32 * outs) / (inside + outs)
    assert bits_per_parameter(config(policy="weight=int4@channel,lsq+")) is None


def test_bits_of_a_tied_embedding_are_those_that_the_converted_model_takes():
    """It has learned a step as a table and another as the output layer, so that it has no one scale to be stored by."""
    policy = "weight=int4@channel,lsq,embedding=int4@channel,lsq"
    small = {"kind": "transformer", "depth": 1, "width": 16, "heads": 2, "tie_embeddings": True}
    one = config(model=small, data={"kind": "tinyshakespeare", "seq_len": 8, "batch": 4}, policy=policy)
    model, tokens = models.build(one.model, one.data.spec(), 0), np.arange(32, dtype=np.int32).reshape(4, 8)
    trained = pl.prepare_qat(model, policy, tokens)
    trained(tokens)

    with pytest.warns(UserWarning, match="a scale of its own at each of its sites"):
        stored = pl.nn.storage(pl.convert(trained, None, tokens))

    assert {row.path: row.format for row in stored}["tokens/embedding"] == "float32"
    assert bits_per_parameter(one) == float(8 * stored.nbytes / stored.elements)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"qat": {"freeze": 3}}, "and policy .* has none. Drop qat"),
        ({"policy": POLICY, "qat": {"freeze": -1}}, "greater than or equal to 0"),
        ({"policy": POLICY, "qat": {"momentum": 0}}, "greater than 0"),
        ({"policy": f"params=bfloat16,{POLICY}"}, "train beside float32 parameters"),
        ({"policy": POLICY, "lora": {"rank": 2}}, "leave out lsq"),
        ({"evals": {"learned": "weight=int4,lsq"}}, "make it the policy of an arm"),
    ],
)
def test_a_state_that_a_run_cannot_hold_is_refused_in_its_config(changes, says):
    with pytest.raises(ValueError, match=says):
        config(**changes)


def test_running_ranges_of_a_convolution_with_a_batch_norm_are_checked_before_the_run():
    small = {"kind": "convnet", "channels": [4], "norm": "batch"}

    check(config(model=small, policy="weight=int8@channel,activation=int8@tensor,ema"))

    with pytest.raises(ValueError, match="matched no site"):
        check(config(model=small, policy="weight=int8@channel,lsq;nowhere/**:weight=none"))
    assert jnp.float32 == program_for(config(policy=POLICY), SPEC).state_shapes.params["head"]["kernel"].dtype
