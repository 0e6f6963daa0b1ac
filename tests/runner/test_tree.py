import pytest
from hypothesis import given
from hypothesis import strategies as st

from precision_lab.runner.tree import from_python, from_setting, merge, suggestion

KEYS = st.sampled_from("abc")
TREES = st.recursive(st.integers(0, 3), lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)
MAPPINGS = st.dictionaries(KEYS, TREES, max_size=3)


@given(MAPPINGS)
def test_merging_nothing_changes_nothing(data):
    assert merge(from_python(data), from_python({})).data == data
    assert merge(from_python({}), from_python(data)).data == data


@given(MAPPINGS)
def test_merging_twice_is_merging_once(data):
    base = from_python({"a": 1, "b": {"c": 2}})

    once = merge(base, from_python(data))

    assert merge(once, from_python(data)).data == once.data


@given(MAPPINGS, MAPPINGS, MAPPINGS)
def test_an_override_says_the_last_word_on_every_single_value(base, first, second):
    merged = merge(merge(from_python(base), from_python(first)), from_python(second))

    for keys, value in leaves(second):
        found = merged.data
        for key in keys:
            found = found[key]
        assert found == value


def leaves(data, at=()):
    """Yields the path and the value of everything that is not a mapping."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def test_lists_replace_and_mappings_merge():
    merged = merge(from_python({"a": [1, 2], "b": {"x": 1, "y": 2}}), from_python({"a": [3], "b": {"y": 4}}))

    assert merged.data == {"a": [3], "b": {"x": 1, "y": 4}}


def test_a_kind_alone_switches_the_kind_and_a_key_alone_keeps_it():
    base = from_python({"scale": {"kind": "static", "scale": 8}})

    switched = merge(base, from_python({"scale": "dynamic"}))
    tuned = merge(from_python({"scale": "dynamic"}), from_python({"scale": {"interval": 5}}))

    assert switched.data["scale"]["kind"] == "dynamic"
    assert switched.inherited == {("scale", "scale")}
    assert tuned.data == {"scale": {"kind": "dynamic", "interval": 5}}


def test_a_setting_has_the_scalar_rules_of_a_file():
    keys, tree = from_setting("train.steps=010")

    assert keys == ("train", "steps")
    assert tree.data == {"train": {"steps": 10}}
    assert from_setting("a=off")[1].data == {"a": "off"}
    assert from_setting("a=[1e-3, x]")[1].data == {"a": [1e-3, "x"]}
    assert from_setting("policy=params=float16,compute=float16")[1].data == {"policy": "params=float16,compute=float16"}
    assert from_setting("a=")[1].data == {"a": None}


@pytest.mark.parametrize("text", ["optim.lr", "=3", "a..b=3", ".a=3"])
def test_a_setting_without_a_key_or_a_value_is_refused(text):
    with pytest.raises(ValueError, match="expected key=value with a dotted key"):
        from_setting(text)


def test_a_suggestion_is_the_nearest_word_or_all_of_them():
    assert suggestion("lrr", ["lr", "momentum"]) == "; did you mean 'lr'?"
    assert suggestion("xyz", ["lr", "momentum"]) == "; known: lr, momentum."
    assert suggestion("xyz", []) == "."
