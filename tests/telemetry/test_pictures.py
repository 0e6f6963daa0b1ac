"""Pictures say what the readings say."""

import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab.nn import sites
from precision_lab.telemetry import compare, observe

W = 2.0 ** np.arange(-12, 4).reshape(4, 4).astype(np.float32)


@pytest.fixture(scope="module")
def seen():
    return observe(lambda p, x: x @ p["w"], {"w": W}, np.zeros((2, 4), np.float32), policy="compute=float8_e4m3fn")


def test_each_bar_is_the_share_of_a_binade_and_the_window_is_that_of_the_format(seen):
    figure = seen.plot(roles=["rhs"])

    axes = figure.axes[0]
    bars = [patch for patch in axes.patches if patch.get_width() == 1.0 and patch.get_height() == 1 / 16]
    assert [round(bar.get_x() + 0.5) for bar in bars] == list(range(-12, 4))
    edges = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches if patch not in bars)
    assert edges == [(-9.5, -6.5), (-6.5, 8.5)]  # subnormals from 2^-9, normal from 2^-6, 448 in the binade of 2^8
    assert axes.get_title() == "w rhs\nfloat8_e4m3fn"


def test_zeros_are_named(seen):
    assert seen.plot(roles=["lhs"], fmt="int8").axes[0].get_title() == "w lhs\nint8, 100% zero"


def test_the_table_prints_every_tensor_with_its_shares(seen):
    """Of 16 weights six lie below 2^-6; 2^-12 and 2^-11 round to zero, and so does 2^-10, the tie."""
    printed = str(seen)

    assert [mark.role for mark in seen.marks] == ["lhs", "rhs", "output"]
    line = next(line for line in printed.splitlines() if " rhs " in line)
    assert "37.5%" in line
    assert "18.8%" in line
    row = seen.to_dicts()[1]
    assert (row["site"], row["format"], row["below"], row["flushed"]) == ("w", "float8_e4m3fn", 6 / 16, 3 / 16)


def test_tables_are_text_in_a_notebook_too(seen, monkeypatch):
    """There, str(table) was empty, because rich displayed the table by itself."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    one = jnp.eye(2)
    tables = [seen, compare(jnp.dot, ["float32", "bfloat16_mixed"], one, one), sites(jnp.dot, one, one)]

    assert ["│" in str(table) for table in tables] == [True] * 3


def test_what_cannot_be_drawn_is_refused(seen):
    with pytest.raises(ValueError, match="none of the 3 tensors has a role"):
        seen.plot(roles=["value"])
    with pytest.raises(ValueError, match="mxfp4 has no window"):
        seen.plot(fmt="mxfp4")
