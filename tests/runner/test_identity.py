import copy
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from precision_lab.runner import load
from precision_lab.runner.identity import canonical_json, digest, run_id, semantic
from precision_lab.runner.yaml12 import dump
from precision_lab.training.config import RunConfig
from tests.runner.fakes import EXPERIMENT

RUN = {key: EXPERIMENT[key] for key in ("model", "data", "optim", "train")}
NUMBERS = st.integers(-(10**15), 10**15) | st.floats(allow_nan=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


def reordered(value):
    """Returns the same data with every mapping in the opposite order, and tuples for lists."""
    if isinstance(value, Mapping):
        return {key: reordered(value[key]) for key in reversed(list(value))}
    return tuple(map(reordered, value)) if isinstance(value, list) else value


@given(PLAIN)
def test_order_of_keys_and_kind_of_sequence_do_not_count(value):
    assert digest(value) == digest(reordered(value))


@given(PLAIN, PLAIN)
def test_equal_texts_mean_equal_values(one, other):
    same_text = canonical_json(one) == canonical_json(other)

    assert same_text == (semantic(one) == semantic(other) and same_types(one, other))


def same_types(one, other):
    """Returns whether two equal values agree on what is true or false and what is a number, at every depth."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, Mapping):
        return all(same_types(one[key], other[key]) for key in one)
    return not isinstance(one, list) or all(map(same_types, one, other))


def test_whole_floats_and_both_zeros_are_one_number():
    assert digest({"lr": 1}) == digest({"lr": 1.0}) == digest({"lr": 1e0})
    assert digest(0.0) == digest(-0.0) == digest(0)
    assert digest(1) != digest(True) != digest("1")


def test_how_often_to_save_is_no_part_of_a_run():
    often, seldom = (
        RunConfig.model_validate({**RUN, "train": {**RUN["train"], "checkpoint_every": every}}) for every in (1, 5)
    )

    assert run_id(often) == run_id(seldom) == run_id(RunConfig.model_validate(RUN))


def test_infinities_and_nan_have_a_canonical_form():
    texts = {canonical_json(value) for value in (math.inf, -math.inf, math.nan, "inf", "nan")}

    assert len(texts) == 5
    assert not any("Infinity" in text or "NaN" in text for text in texts)


def test_yaml_python_and_settings_give_one_run(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump({**EXPERIMENT, "optim": {"lr": 7, "kind": "sgd"}}))

    from_file = load(path, settings=["optim.lr=1e-1"])
    from_python = load(reordered(EXPERIMENT))
    from_pairs = load({**EXPERIMENT, "optim": {"kind": "sgd", "lr": 3}}, settings={"optim.lr": 0.1})

    ids = [{arm: {s: run_id(run) for s, run in runs.items()} for arm, runs in exp.runs.items()}
           for exp in (from_file, from_python, from_pairs)]  # fmt: skip
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("lr", ["1", "1.0", "1e0", "+1", "1."])
def test_ways_to_write_a_number_give_one_run(tmp_path, lr):
    path = tmp_path / "config.yaml"
    path.write_text(dump(EXPERIMENT).replace("lr: 0.1", f"lr: {lr}"))

    found = run_id(load(path).runs["float32"][0])

    expected = run_id(RunConfig.model_validate({**RUN, "optim": {"kind": "sgd", "lr": 1.0}}))
    assert found == expected


def test_a_policy_has_one_identity_however_it_is_written():
    names = ["float16_mixed", str(RunConfig.model_validate({**RUN, "policy": "float16_mixed"}).policy)]

    assert len({run_id(RunConfig.model_validate({**RUN, "policy": name})) for name in names}) == 1


def test_name_notes_claims_and_paper_do_not_change_a_run():
    changed = {**EXPERIMENT, "name": "other", "notes": "x", "claims": [], "paper": {"arxiv": "1710.03740"}}

    assert run_id(load(changed).runs["float16"][1]) == run_id(load(EXPERIMENT).runs["float16"][1])


CHANGES = [
    ("model", {"kind": "mlp", "hidden": [5]}),
    ("data", {"kind": "digits", "batch": 9}),
    ("optim", {"kind": "sgd", "lr": 0.2}),
    ("optim", {"kind": "sgd", "lr": 0.1, "momentum": 0.5}),
    ("optim", {"kind": "adam", "lr": 0.1}),
    ("train", {"steps": 11, "log_every": 5}),
    ("train", {"steps": 10, "log_every": 5, "loss_shift": 1}),
    ("policy", "bfloat16_mixed"),
    ("loss_scale", {"kind": "static", "scale": 8}),
    ("seed", 1),
]


@pytest.mark.parametrize(("key", "value"), CHANGES, ids=lambda part: str(part)[:40])
def test_every_change_of_meaning_is_another_run(key, value):
    assert run_id(RunConfig.model_validate({**RUN, key: value})) != run_id(RunConfig.model_validate(RUN))


def test_a_default_written_out_is_the_same_run():
    whole = RunConfig.model_validate(RUN).model_dump()

    assert run_id(RunConfig.model_validate(copy.deepcopy(whole))) == run_id(RunConfig.model_validate(RUN))


def test_a_field_added_later_orphans_no_run_while_it_has_its_legacy_value():
    class Before(BaseModel):
        lr: float = 0.1

    class After(BaseModel):
        lr: float = 0.1
        clip: float | None = Field(default=1.0, json_schema_extra={"legacy": None})
        watch: bool = Field(default=False, json_schema_extra={"semantic": False})

    assert digest(Before()) == digest(After(clip=None)) == digest(After(clip=None, watch=True))
    assert digest(After()) != digest(Before())


def test_what_has_no_canonical_form_is_refused():
    with pytest.raises(TypeError, match="no canonical form for function"):
        canonical_json({"f": lambda: 0})
