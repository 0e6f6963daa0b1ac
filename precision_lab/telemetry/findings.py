"""What a doctor found, in plain words: one sentence for each kind of trouble, with the worst tensor and the counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from precision_lab import formats
from precision_lab.telemetry import changes
from precision_lab.telemetry.changes import Change

if TYPE_CHECKING:
    from precision_lab.telemetry.doctor import Leaf

_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
      kind: "nonfinite", "misread", "record", "overflow", "flushed", "subnormal", "own_subnormal", "narrower",
        "constant", "whole_numbers", "uncounted"; of two checkpoints "missing", "added", "shape", "reinterpreted",
        "cast", "through", "values", "same".
      paths: the tensors, the worst first.
      text: a sentence.
    """

    kind: str
    paths: tuple[str, ...]
    text: str


def of_leaves(leaves: Sequence[Leaf], fmts: Sequence[Any]) -> list[Finding]:
    """Returns what there is to say of tensors by themselves, what is certainly wrong first."""
    found = [_nonfinite(leaves), *map(_misread, leaves), _record(leaves), _own_subnormal(leaves)]
    for fmt in fmts:
        limits = {
            "overflow": f"beyond {fmt.max:g}",
            "flushed": "too small for it",
            "subnormal": "below its normal ones",
        }
        found += [_unfit(leaves, fmt.name, kind, f"{_BECOMES[kind]} ({limit})") for kind, limit in limits.items()]
    others = *_narrower(leaves), _constant(leaves), *map(_whole, leaves)
    return [one for one in (*found, *others, _uncounted(leaves)) if one]


def _nonfinite(leaves: Sequence[Leaf]) -> Finding | None:
    bad = _worst_first(leaves, lambda leaf: leaf.infs + leaf.nans)
    if not bad:
        return None
    counts = f"{number_of(sum(leaf.infs for leaf in bad), 'infinity')} and {sum(leaf.nans for leaf in bad):,} NaN"
    named = _named(bad, lambda leaf: f"{leaf.infs:,} inf, {leaf.nans:,} NaN of {leaf.count:,}")
    return _finding("nonfinite", bad, f"not finite: {counts} in {number_of(len(bad), 'tensor')}: {named}.")


def _misread(leaf: Leaf) -> Finding | None:
    if not leaf.misread_as:
        return None
    way = f"read the same bits again as {leaf.misread_as}, do not cast"
    text = f"{leaf.path} is stored as {leaf.dtype}, but its bits look like {leaf.misread_as}: {_evidence(leaf)}; {way}."
    return Finding("misread", (leaf.path,), text)


def _evidence(leaf: Leaf) -> str:
    """Returns what gave a tensor away."""
    if leaf.dtype == "float16":
        return f"nearly all magnitudes lie within a few binades up to {leaf.amax:.3g}, none near zero"
    if leaf.dtype == "bfloat16":
        return f"its values are tiny (largest {leaf.amax:.3g}) and spread over dozens of binades"
    forgot = "NumPy forgets the names of types that are not its own, and " if leaf.is_record else ""
    return f"{forgot}as such they are spread like weights"


def _record(leaves: Sequence[Leaf]) -> Finding | None:
    bad = [leaf for leaf in leaves if leaf.is_record and not leaf.misread_as]
    text = (
        f"bytes without a number type, which is how NumPy saves bfloat16 and float8: {_named(bad)}; view them as such."
    )
    return _finding("record", bad, text) if bad else None


def _own_subnormal(leaves: Sequence[Leaf]) -> Finding | None:
    # The subnormals of 8 bits and fewer are in everyday use, and hardware that has such types has them.
    bad = _worst_first(leaves, lambda leaf: leaf.subnormal if leaf.subnormal and _own(leaf).bits > 8 else 0)
    if not bad:
        return None
    named = _named(bad, lambda leaf: f"{leaf.subnormal:,} of {leaf.count:,} below {_own(leaf).min_normal:.3g}")
    total = number_of(sum(leaf.subnormal for leaf in bad), "value")
    text = f"{total} nearer to zero than the smallest normal number of their own type, which hardware may take for zero"
    return _finding("own_subnormal", bad, f"{text}: {named}.")


_BECOMES = {"overflow": "overflow", "flushed": "become zero", "subnormal": "keep only some of their bits"}


def _unfit(leaves: Sequence[Leaf], name: str, kind: str, what: str) -> Finding | None:
    """Returns how many values a format would not hold."""

    def count(leaf: Leaf) -> int:
        if leaf.dtype == name:  # What is stored in a format fits it; its subnormals are told elsewhere.
            return 0
        return next((getattr(fit, kind) for fit in leaf.fits if fit.format == name), 0)

    bad = _worst_first(leaves, count)
    if not bad:
        return None
    total, named = sum(map(count, bad)), _named(bad, lambda leaf: percent(count(leaf), leaf.count))
    return _finding(
        kind, bad, f"{name}: {number_of(total, 'value')} would {what}, in {number_of(len(bad), 'tensor')}: {named}."
    )


def _narrower(leaves: Sequence[Leaf]) -> list[Finding]:
    groups = _grouped(leaves, lambda leaf: (leaf.dtype, leaf.narrower) if leaf.narrower else None)
    return [
        _finding(
            "narrower",
            same,
            f"{dtype} with only {narrow} values in {number_of(len(same), 'tensor')}: {_named(same)}; they have been "
            f"{narrow} before, and more bits bring nothing back.",
        )
        for (dtype, narrow), same in groups.items()
    ]


def _constant(leaves: Sequence[Leaf]) -> Finding | None:
    groups = _grouped(leaves, lambda leaf: leaf.constant)
    if not groups:
        return None
    parts = [f"{value:g} in {_named(same)}" for value, same in groups.items()]
    return _finding("constant", [leaf for same in groups.values() for leaf in same], f"constant: {'; '.join(parts)}.")


def _whole(leaf: Leaf) -> Finding | None:
    if leaf.whole_numbers is None:
        return None
    low, high = leaf.whole_numbers
    text = f"{leaf.path} is {leaf.dtype}, but holds whole numbers only, from {low} to {high}: an index or a counter?"
    return Finding("whole_numbers", (leaf.path,), text)


def _uncounted(leaves: Sequence[Leaf]) -> Finding | None:
    wide = [leaf for leaf in leaves if leaf.reading is None and leaf.dtype.startswith("float")]
    text = f"not counted, being wider than float64: {_named(wide, lambda leaf: leaf.dtype)}."
    return _finding("uncounted", wide, text) if wide else None


def of_changes(leaves: Sequence[Leaf], missing: Sequence[str], added: Sequence[str]) -> list[Finding]:
    """Returns what there is to say of a checkpoint against an earlier one."""
    found = [_paths("missing", missing, "in the other one only"), _paths("added", added, "not in the other one")]
    groups = _grouped(leaves, lambda leaf: _change_group(leaf.change))
    for key in sorted(groups, key=lambda key: _ORDER.index(key[0])):
        same = sorted(groups[key], key=lambda leaf: -leaf.change.changed)  # pyright: ignore[reportOptionalMemberAccess]
        found.append(_finding(key[0], same, _change_text(same)))
    told = [one for one in found if one]
    return told or [Finding("same", (), "every array is the same as in the other one.")]


_ORDER = (changes.REINTERPRETED, changes.THROUGH, changes.CAST, changes.SHAPE, changes.VALUES)


def _change_group(change: Change | None) -> tuple[str, ...] | None:
    """Returns what changes have in common that are told together."""
    if change is None or change.kind == changes.SAME:
        return None
    trained = change.kind in (changes.VALUES, changes.SHAPE) and change.before == change.after
    return (change.kind,) if trained else (change.kind, change.before, change.after, change.via)


def _change_text(same: Sequence[Leaf]) -> str:
    """Returns one kind of change in words."""
    told = [leaf.change for leaf in same if leaf.change]
    kind, types, many = told[0].kind, f"{told[0].before} -> {told[0].after}", number_of(len(same), "tensor")
    if kind == changes.SHAPE:
        return f"another shape in {many}: {_named(same)}."
    lost = [leaf for leaf in same if leaf.change and leaf.change.changed]
    named = _named(lost, _loss) if lost else _named(same)
    if kind == changes.REINTERPRETED:
        return f"{types}: the same bits under another type, not a cast, in {many}: {named}."
    if kind == changes.THROUGH:
        return f"{told[0].after} that went through {told[0].via} and back in {many}: {named}."
    if kind == changes.CAST:
        if not lost:
            return f"cast {types} in {many}, every value the same: {_named(same)}."
        return f"cast {types} in {many}, {len(lost):,} of them lost bits: {named}."
    also = "" if told[0].before == told[0].after else f", {types}, which no rounding explains"
    return f"other values in {many}{also}: {named}."


def _loss(leaf: Leaf) -> str:
    """Returns how much of a tensor changed."""
    change = leaf.change
    assert change is not None
    more = [f"at most {change.max_rel:.2g} relative"] if change.max_rel else []
    more += [f"{n:,} {what}" for n, what in ((change.overflowed, "overflowed"), (change.zeroed, "became zero")) if n]
    return ", ".join([f"{change.changed:,} of {leaf.count:,} values", *more])


def _paths(kind: str, paths: Sequence[str], what: str) -> Finding | None:
    """Returns a finding about tensors of one side."""
    return (
        Finding(kind, tuple(paths), f"{number_of(len(paths), 'tensor')} {what}: {_listed(paths)}.") if paths else None
    )


def _own(leaf: Leaf) -> Any:
    return formats.format(leaf.dtype)


def _worst_first(leaves: Sequence[Leaf], count: Callable[[Leaf], int]) -> list[Leaf]:
    """Returns the tensors with any, those with the largest share first."""
    return sorted(filter(count, leaves), key=lambda leaf: -count(leaf) / leaf.count)


def _grouped(leaves: Sequence[Leaf], key: Callable[[Leaf], Any]) -> dict[Any, list[Leaf]]:
    """Returns tensors by what they have in common; those without are left out."""
    groups: dict[Any, list[Leaf]] = {}
    for leaf in leaves:
        if (found := key(leaf)) is not None:
            groups.setdefault(found, []).append(leaf)
    return groups


def _finding(kind: str, leaves: Iterable[Leaf], text: str) -> Finding:
    return Finding(kind, tuple(leaf.path for leaf in leaves), text)


def _named(leaves: Sequence[Leaf], detail: Callable[[Leaf], str] | None = None) -> str:
    """Returns the first few tensors by path, each with a detail."""
    return _listed([f"{leaf.path} ({detail(leaf)})" if detail else leaf.path for leaf in leaves])


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _NAMED:,} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])


def number_of(count: int, noun: str) -> str:
    """Returns "1 value", "2 values", "3 infinities"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("ty") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def percent(part: int, whole: int) -> str:
    """Returns a share; never "0 %" or "100 %" of what is not."""
    share = 100 * part / whole
    return f"{part:,} of {whole:,}" if part < whole and (share < 0.01 or share > 99.99) else f"{share:.3g} %"
