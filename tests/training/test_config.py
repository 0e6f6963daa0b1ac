"""Run configs: one canonical form, errors at the field, nothing that could not be honoured."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from precision_lab.training import RunConfig
from tests.training.runs import BASE, HALF, config


def errors(**changes):
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({**BASE, **changes})
    return [(error["loc"], error["msg"]) for error in caught.value.errors()]


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"sed": 1}, ("sed",), "Extra inputs"),
        ({"seed": -1}, ("seed",), "greater than or equal to 0"),
        ({"optim": {"kind": "sgd", "lr": False}}, ("optim", "lr"), "valid number"),
        ({"optim": {"kind": "sgd", "lr": "1e-3"}}, ("optim", "lr"), "valid number"),
        ({"optim": {"kind": "sgd", "lr": float("nan")}}, ("optim", "lr"), "finite"),
        ({"optim": {"kind": "sdg", "lr": 1.0}}, ("optim", "kind"), "Did you mean 'sgd'"),
        ({"optim": {"kind": "sgd", "lr": 1.0, "nesterov": True}}, ("optim", "nesterov"), "needs momentum"),
        ({"optim": {"kind": "adam", "lr": 1.0, "b1": 1.0}}, ("optim", "b1"), "less than 1"),
        ({"optim": {"kind": "sgd", "lr": 1.0, "schedule": {"kind": "cos"}}}, ("optim", "schedule", "kind"), "'cosine'"),
        ({"loss_scale": {"kind": "static"}}, ("loss_scale", "scale"), "required"),
        ({"loss_scale": {"kind": "static", "scale": 1e39}}, ("loss_scale", "scale"), "less than"),
        ({"loss_scale": {"kind": "dynamic", "min": 4.0, "init": 2.0}}, ("loss_scale", "init"), "min <= init <= max"),
        ({"loss_scale": False}, ("loss_scale",), "expected a mapping with a 'kind'"),
        ({"train": {"steps": -1}}, ("train", "steps"), "greater than or equal to 0"),
        ({"train": {"steps": True}}, ("train", "steps"), "valid integer"),
        ({"train": {"steps": 1, "on_nonfinite": "skp"}}, ("train", "on_nonfinite"), "'stop', 'skip' or 'continue'"),
        ({"evals": {"train": "float32"}}, ("evals",), "no policy may be called 'train'"),
        ({"evals": {"Train": "float32"}}, ("evals",), "no policy may be called 'train'"),
        ({"evals": {"b": "float32", "B": "float16"}}, ("evals",), "'b' and 'B' would share a column of the store"),
        ({"policy": None}, ("policy",), "expected a policy such as float32"),
        ({"policy": True}, ("policy",), "expected a policy such as float32"),
        ({"policy": "params=flaot32"}, ("policy",), "float32"),
        ({"policy": "params=float8_e5m2"}, ("policy",), "training can store float32, bfloat16, float16"),
        ({"master_weights": True}, ("master_weights",), "needs 16-bit parameters"),
        (
            {"optim": {"kind": "sgd", "lr": 1.0, "state": "int8"}},
            ("optim", "state"),
            "sgd without momentum has no state",
        ),
        ({"optim": {"kind": "adam", "lr": 1.0, "state": "int88"}}, ("optim", "state"), "unknown format 'int88'"),
        ({"optim": {"kind": "adam", "lr": 1.0, "state": 8}}, ("optim", "state"), "expected a quantizer such as"),
        ({"update": "kahan"}, ("update",), "policy 'params=float32"),
        (
            {"update": "stochastic", "policy": "bfloat16_pure", "master_weights": True},
            ("update",),
            "master_weights updates float32 masters.*Drop update",
        ),
        ({"update": "random", "policy": "bfloat16_pure"}, ("update",), "'nearest', 'stochastic' or 'kahan'"),
        ({"data": {"kind": "tinyshakespeare"}}, ("model", "kind"), "is for classification data"),
    ],
)
def test_a_wrong_field_is_located(changes, where, what):
    [(loc, message)] = errors(**changes)

    assert loc == where
    assert re.search(what, message)


def test_a_warmup_must_be_shorter_than_the_run():
    optim = {"kind": "sgd", "lr": 1.0, "schedule": {"kind": "warmup_cosine", "warmup": 20}}

    [(loc, message)] = errors(optim=optim, train={"steps": 20})

    assert loc == ("optim", "schedule", "warmup")
    assert "warmup is 20, train.steps only 20" in message


@pytest.mark.parametrize(
    ("optim", "what"),
    [
        ({"kind": "adam", "lr": 1.0}, "needs optim.kind sgd, got adam"),
        ({"kind": "sgd", "lr": 1.0, "clip_norm": 1.0}, "exclude each other"),
    ],
)
def test_a_loss_shift_is_refused_where_it_would_change_a_float32_run(optim, what):
    [(loc, message)] = errors(optim=optim, train={"steps": 5, "loss_shift": 3})

    assert loc == ("train", "loss_shift")
    assert what in message


@pytest.mark.parametrize("shift", [-33, 33])
def test_a_loss_shift_towards_subnormal_gradients_is_refused(shift):
    [(loc, _)] = errors(train={"steps": 5, "loss_shift": shift})

    assert loc == ("train", "loss_shift")


def test_a_state_is_kept_in_canonical_form():
    optim = {"kind": "adam", "lr": 1.0, "state": "int8@per_tensor"}

    assert config(optim=optim).optim.state == config(optim={**optim, "state": "INT8"}).optim.state == "int8"


def test_a_policy_is_kept_in_canonical_form():
    spellings = ["p=f16,c=f16,o=f32", HALF, "output=float32, compute=half, params=float16"]

    configs = {config(policy=spelling) for spelling in spellings}

    assert len(configs) == 1
    assert configs.pop().policy == HALF


@given(
    lr=st.floats(1e-30, 1e30),
    hidden=st.lists(st.integers(1, 512), max_size=3),
    seed=st.integers(0, 2**32 - 1),
    schedule=st.sampled_from([{"kind": "constant"}, {"kind": "cosine", "end": 0.5}]),
    scale=st.sampled_from([{"kind": "none"}, {"kind": "static", "scale": 8.0}, {"kind": "dynamic"}]),
)
def test_a_config_survives_its_own_dump(lr, hidden, seed, schedule, scale):
    optim = {"kind": "adamw", "lr": lr, "schedule": schedule}
    made = config(model={"kind": "mlp", "hidden": hidden}, optim=optim, seed=seed, loss_scale=scale)

    assert RunConfig.model_validate(made.model_dump()) == made
    assert RunConfig.model_validate_json(made.model_dump_json()) == made
    assert hash(RunConfig.model_validate(made.model_dump(mode="json"))) == hash(made)
