"""Groups: arms that share a program, and the words about those that do not."""

import pytest

from precision_lab import runner
from precision_lab.runner.groups import describe, groups
from tests.runner.fakes import EXPERIMENT


def grouped(arms, **changes):
    """Returns the groups of an experiment with these arms."""
    return groups(runner.load({**EXPERIMENT, "claims": [], **changes, "arms": arms}))


def test_arms_that_differ_in_numbers_are_one_group():
    arms = {f"bits_{n}": {"policy": f"weight=int{n}@channel"} for n in range(2, 9)}
    arms |= {"slow": {"policy": "weight=int8@channel", "optim": {"lr": 1e-3}}}
    arms |= {"long": {"policy": "weight=int8@channel", "train": {"steps": 20, "eval_every": 5}}}

    [group] = grouped(arms)

    assert group.arms == tuple(arms)
    assert group.runs == len(arms) * 3
    assert group.reason == ""


def test_arms_that_differ_in_a_simulated_format_of_products_are_one_group():
    arms = {name: {"policy": f"compute={name};**/head/**:compute=float32"} for name in ("float8_e5m2", "e5m3", "tf32")}

    [group] = grouped(arms)

    assert group.arms == tuple(arms)


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        ({"policy": "weight=int4@tensor"}, "policy weight=int4, not int4@channel"),
        ({"policy": "weight=nf4"}, "policy weight=nf4, not int4@channel (nf4 is no scaled scalar format"),
        ({"policy": "compute=bfloat16,weight=int4@channel"}, "policy compute=bfloat16, not float32"),
        ({"policy": "weight=int4@channel;**/head/**:weight=none"}, "policy rules are **/head/**:weight=none, not none"),
        ({"model": {"kind": "mlp", "hidden": [8]}}, "model.hidden is (8,), not (4,)"),
        ({"data": {"kind": "digits", "batch": 16}}, "data.batch is 16, not 8"),
        ({"optim": {"kind": "adam", "lr": 0.1}}, "optim.kind is adam, not sgd"),
        ({"optim": {"kind": "sgd", "lr": 0.1, "momentum": 0.9}}, "optim.momentum is 0.9, not 0.0"),
        ({"loss_scale": {"kind": "dynamic"}}, "loss_scale.kind is dynamic, not none"),
        ({"lora": {"rank": 2}}, "lora is given, not nothing"),
    ],
)
def test_an_arm_apart_says_which_part_of_its_structure_differs(arm, reason):
    first, second = grouped({"four": {}, "other": arm}, policy="weight=int4@channel")

    assert first.arms == ("four",)
    assert second.arms == ("other",)
    assert reason in second.reason
    assert second.reason.startswith("unlike four: ")
    assert reason in describe([first, second])


def test_the_reason_is_given_against_the_group_that_is_most_alike():
    arms = {"a": {"policy": "compute=bfloat16,weight=int4@tensor"}, "b": {}, "c": {"policy": "weight=int8@tensor"}}

    *_, last = grouped(arms, policy="weight=int4@channel")

    assert last.reason == "unlike b: policy weight=int8, not int4@channel"


def test_all_runs_are_in_exactly_one_group():
    found = groups(runner.load(EXPERIMENT))

    assert sorted(arm for group in found for arm in group.arms) == sorted(EXPERIMENT["arms"])
    assert sum(group.runs for group in found) == 9
    assert describe(found).startswith("9 runs in 3 compiled programs:")
