"""Pictures of formats: marks where the values are."""

import pytest

from precision_lab import formats
from precision_lab.formats.pictures import exponent_window, number_line


def test_number_line_has_one_mark_for_each_value_where_there_is_room():
    """int4 has 15 evenly spaced values; E2M1 has 0, 0.5, ... 6 on both sides."""
    line, labels = number_line(formats.format("int4")).splitlines()

    assert line.count(".") == 15
    assert labels.startswith("-7")
    assert labels.endswith("7")
    assert number_line(formats.format("float4_e2m1fn")).splitlines()[0] == _e2m1_line()


def _e2m1_line() -> str:
    """Returns the picture of E2M1 worked by hand: 73 cells, 6 to a unit, zero in the middle."""
    cells = [" "] * 73
    for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6):
        for side in (1, -1):
            cells[36 + int(side * value * 6)] = "."
    return "".join(cells)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_exponent_window_marks_both_ends(name):
    fmt = formats.format(name)

    if fmt.kind == "float":
        picture, _, marks = exponent_window(fmt).splitlines()
        assert "=" in picture
        assert f"normal from 2^{fmt.min_exponent}" in marks
