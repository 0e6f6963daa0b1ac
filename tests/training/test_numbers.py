"""What of a config is an argument of its program: everything is that, or structure, or the loop's business."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import BaseModel

from precision_lab import data
from precision_lab.data import DigitsConfig
from precision_lab.policy import Policy
from precision_lab.training import program as programs
from precision_lab.training.config import RunConfig
from precision_lab.training.numbers import Decay, hyper, static_part
from precision_lab.training.program import check_program, program_for
from tests.training.runs import HALF, config

SPEC = DigitsConfig().spec()
W4 = "weight=int4@channel"
KINDS = {
    "sgd": {"optim": {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 2.0}},
    "adam": {"optim": {"kind": "adam", "lr": 0.1, "schedule": {"kind": "cosine", "end": 0.1}}, "policy": W4},
    "adamw": {"optim": {"kind": "adamw", "lr": 0.1, "schedule": {"kind": "warmup_cosine", "warmup": 3}}},
    "static": {"policy": HALF, "master_weights": True, "loss_scale": {"kind": "static", "scale": 8.0}},
    "dynamic": {"policy": HALF, "master_weights": True, "loss_scale": {"kind": "dynamic"}},
}
ARGUMENTS = {
    "seed", "policy", "optim.lr", "optim.momentum", "optim.weight_decay", "optim.b1", "optim.b2", "optim.eps",
    *(f"loss_scale.{name}" for name in ("scale", "init", "growth", "backoff", "interval", "min", "max")),
    "train.loss_shift",
}  # fmt: skip
OF_THE_LOOP = {f"train.{name}" for name in ("steps", "eval_every", "log_every", "checkpoint_every", "eval_examples")}
OF_THE_LOOP |= {"train.on_nonfinite", "train.eval_at"}


def leaves(value, path=""):
    """Yields (dotted path, value) of every field of a config."""
    for name in type(value).model_fields:
        inner = getattr(value, name)
        if isinstance(inner, BaseModel):
            yield from leaves(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", inner


def changed(one, path, value):
    """Returns a config with one field changed."""
    head, _, tail = path.partition(".")
    return one.model_copy(update={head: changed(getattr(one, head), tail, value) if tail else value})


def another(path, value):
    """Returns another value of a field that is an argument or the loop's."""
    if path == "policy":
        return value.replace("int4", "int3").replace("float16", "bfloat16").replace("compute=float32", "compute=tf32")
    if path == "train.on_nonfinite":
        return "continue"
    return value * 2 + 1 if isinstance(value, int) else 1000 if value is None else value / 2 if value else value


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_an_argument_or_the_loops_or_else_structure(kind):
    """A field that is in neither list here must survive in the static part, so that its values have a program each."""
    one = config(**KINDS[kind])
    static = dict(leaves(static_part(one)))

    for path, value in leaves(one):
        if path not in ARGUMENTS | OF_THE_LOOP:
            assert static[path] == value, path


@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_is_passed_to_the_step_or_stays_structure(kind):
    """No number is lost: runs that share a program and differ in what is an argument call it with other numbers."""
    one = config(**KINDS[kind])
    for path, value in leaves(one):
        if path not in ARGUMENTS or path == "seed" or another(path, value) == value:
            continue
        other = changed(one, path, another(path, value))
        alike = static_part(one) == static_part(other)
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (hyper(one), hyper(other))), strict=alike)]

        assert not (alike and all(same)), path
        if path not in ("policy", "train.loss_shift"):
            assert alike, path


@pytest.mark.parametrize("kind", KINDS)
def test_the_static_part_is_a_config_of_itself(kind):
    static = static_part(config(**KINDS[kind]))

    assert static_part(static) == static
    assert RunConfig.model_validate(static.model_dump()) == static


def test_what_switches_something_off_is_structure():
    sgd = {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    on = static_part(config(optim=sgd))

    for name in ("momentum", "weight_decay"):
        assert static_part(config(optim={**sgd, name: 0.0})) != on


@pytest.mark.parametrize("b", [0.25, 0.9, 0.95, 0.999, 0.1])
def test_a_decay_as_an_argument_is_the_number_to_optax_bit_for_bit(b):
    rng = np.random.default_rng(0)
    grads, moments = rng.standard_normal((2, 1000)).astype(np.float32)

    # XLA computes with what is known in advance at compile time, without the fused multiply-add of run time.
    @jax.jit
    def with_argument(decay, count, grads, moments):
        return optax.tree.update_moment(grads, moments, decay, 2), optax.tree.bias_correction(moments, decay, count)

    @jax.jit
    def with_number(count, grads, moments):
        return optax.tree.update_moment(grads, moments, b, 2), optax.tree.bias_correction(moments, b, count)

    for count in (1, 2, 7, 1000):
        arrays = jnp.int32(count), grads, moments
        found, expected = with_argument(Decay.of(b), *arrays), with_number(*arrays)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_decay_of_a_half_is_structure():
    """XLA adds first and multiplies once where it knows that both factors are one half."""
    half, other = (config(optim={"kind": "adam", "lr": 0.1, "b1": b}) for b in (0.5, 0.8))

    assert static_part(half) != static_part(other)
    assert "b1" not in hyper(half).optim


def steps_of(program, one, count=4):
    """Returns the state and metrics after some steps."""
    numbers, batches = hyper(one), data.batches(data.load(one.data), one.data, one.seed)
    state = program.init(one.seed, numbers)
    for step in range(count):
        state, metrics = program.step(state, batches[step], numbers)
    return state, metrics


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
    "policy",
    [
        W4,
        "weight=int3@channel,activation=int8@token",
        "weight=int2;head/**:weight=int8",
        "compute=e5m3;head/**:compute=float32",
    ],
)
def test_traced_numbers_train_to_the_bits_of_static_ones(policy):
    one = config(policy=policy, optim={"kind": "adam", "lr": 1e-2, "b1": 0.8})
    model = programs.model_under(one, SPEC, Policy.parse(policy))
    alone = jax.jit(lambda s, b, n: programs._step(one, model, s, b, n._replace(quantizers={})))

    found = steps_of(program_for(one, SPEC), one)
    expected = steps_of(program_for(one, SPEC)._replace(step=alone), one)

    assert_same_bits(found, expected)


def test_check_19_seven_widths_are_one_executable_and_each_gives_the_bits_of_a_program_of_its_own(monkeypatch):
    widths = [config(policy=f"weight=int{bits}@channel", seed=bits) for bits in range(2, 9)]
    step, traces = programs._step, []
    monkeypatch.setattr(programs, "_step", lambda *given: traces.append(1) or step(*given))
    programs._build.cache_clear()
    in_turn = [steps_of(program_for(one, SPEC), one) for one in widths]
    shared = program_for(widths[0], SPEC).step
    assert len(traces) == 1

    for one, found in list(zip(widths, in_turn, strict=True))[::3]:
        programs._build.cache_clear()
        assert program_for(one, SPEC).step is not shared
        assert_same_bits(steps_of(program_for(one, SPEC), one), found)
    assert len(traces) == 1 + 3  # each of the three was compiled anew
    assert len({np.asarray(metrics["loss"]).tobytes() for _, metrics in in_turn}) == 7


def test_an_evaluation_is_under_the_numbers_of_its_own_run():
    split = data.load(DigitsConfig()).eval
    batch, weights = split.take(np.arange(32)), np.ones(32, np.int32)
    sums = []
    for bits in (2, 8):
        one = config(policy=f"weight=int{bits}@channel")
        program = program_for(one, SPEC)
        sums.append(program.evaluate(program.init(0, hyper(one)), batch, weights)["loss"].item())

    assert sums[0] != sums[1]


def test_an_error_about_a_policy_is_in_its_own_words():
    one = config(policy="weight=int3@group7;**/head/**:weight=int5")
    wrong = config(policy="weight=int3;**/tail/**:weight=int5")

    check_program(program_for(one, SPEC), one)
    with pytest.raises(ValueError, match="tail"):
        check_program(program_for(wrong, SPEC), wrong)
