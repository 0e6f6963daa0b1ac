"""Formats as pictures in plain text, for terminals."""

from typing import Any

from precision_lab.formats.scalar import Format

# Cells to the right of the first; even, so that zero has a cell of its own.
_WIDTH = 72


def number_line(fmt: Any) -> str:
    """Returns a picture of all values of a narrow format, or of anything with a `grid`, on a linear axis."""
    cells = [0] * (_WIDTH + 1)
    values = fmt.grid()
    least, largest = float(values[0]), float(values[-1])
    for value in values:
        cells[round((value - least) / (largest - least) * _WIDTH)] += 1
    line = "".join(" .:|"[min(count, 3)] for count in cells)
    low, high = f"{least:g}", f"{largest:g}"
    middle = "0" if least < 0 else ""
    return f"{line}\n{low}{middle.center(_WIDTH + 1 - len(low) - len(high))}{high}"


def exponent_window(fmt: Format) -> str:
    """Returns a picture of the magnitudes a format covers, on an axis wide enough for it and for float32."""
    lowest = fmt.min_exponent - fmt.mantissa_bits
    top = (fmt.max_code >> fmt.mantissa_bits) - fmt.bias
    left, right = min(lowest, -149), max(top, 127)
    exponents = (left + (right - left) * cell // _WIDTH for cell in range(_WIDTH + 1))
    line = "".join(" " if e < lowest or e > top else "-" if e < fmt.min_exponent else "=" for e in exponents)
    if not line.strip():
        line = line[: (lowest - left) * _WIDTH // (right - left)] + "="
    marks = f"from 2^{lowest} (normal from 2^{fmt.min_exponent}) to 2^{top}"
    return f"|{line}|\n2^{left}{f'2^{right}'.rjust(_WIDTH + 3 - len(f'2^{left}'))}\n{marks}"
