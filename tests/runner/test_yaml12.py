import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precision_lab.runner.yaml12 import dotted, dump, parse, scalar

TEXT = st.text().filter(lambda text: text != "<<")
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("On", "On"),
        ("n", "n"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-11-21", "2026-11-21"),
        ("~", None),
        ("", None),
        ("null", None),
        ("True", True),
        ("tRUE", "tRUE"),
    ],
)
def test_plain_scalars_follow_the_core_schema(text, expected):
    value = scalar(text) if text else parse("key:", "file")[0]["key"]

    assert value == expected
    assert type(value) is type(expected)


def test_a_quoted_number_stays_text():
    value, _ = parse("a: '1'\nb: \"1e-3\"", "file")

    assert value == {"a": "1", "b": "1e-3"}


@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_what_is_dumped_reads_back_unchanged(value):
    read, _ = parse(dump(value), "file")

    assert read == value
    assert repr(read) == repr(value)


def test_every_key_and_item_has_its_line():
    _, places = parse("a:\n  b: [1,\n    2]\nc: 3\n", "some.yaml")

    assert str(places["a", "b"]) == "some.yaml:2"
    assert str(places["a", "b", 1]) == "some.yaml:3"
    assert str(places[("c",)]) == "some.yaml:4"
    assert dotted(places["a", "b", 1].keys) == "a.b[1]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", r"^f:4: b.c: duplicate key, first given on line 3\.$"),
        ("a: [1, 2", r"^f:1: not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", r"^f:1: tags such as .* are not supported"),
        ("base: &b {x: 1}\nc:\n  <<: *b", r"^f:3: c.<<: merge keys are not part of YAML 1\.2"),
        ("a: &x [1, *x]", r"^f:1: an alias that contains itself"),
        ("? [1, 2]\n: 3", r"^f:1: a key must be plain text"),
        ("a: \x07", r"^f: not valid YAML"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, "f")


def test_an_alias_means_what_its_anchor_means():
    value, _ = parse("a: &x {k: 1}\nb: *x", "f")

    assert value == {"a": {"k": 1}, "b": {"k": 1}}
