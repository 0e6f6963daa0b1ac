"""What runs look like inside, kept in `stats/insides.json` of each run so that it is computed once."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precision_lab.runner.atomic import read_json, write_json
from precision_lab.runner.metrics import decode_number, encode_number
from precision_lab.training import ProbeRun

if TYPE_CHECKING:
    from precision_lab.runner.results import Results, Trial

FILE = Path("stats") / "insides.json"
MOST_ARMS = 16
"""How many arms are looked into; each compiles a program of its own."""


@dataclass(frozen=True)
class Inside:
    """What one run shows.

    Attributes:
      seed, step: of the run, and of its checkpoint.
      sites: one mapping per product: `site`, `sqnr_db`, `cumulative_db`.
      tensors: exponents of `weights` and `gradients`; see `training.insides.look_inside`.
      trouble: why there is nothing to see; empty where there is.
    """

    seed: int
    step: int = 0
    sites: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    trouble: str = ""


def known_insides(results: "Results", arms: list[str]) -> dict[str, Inside]:
    """Returns what has been found of some arms, each by its first seed that was looked into."""
    found: dict[str, Inside] = {}
    for arm in arms:
        for one in results.of_arm(arm):
            if arm not in found and (inside := _read(one)) is not None and not inside.trouble:
                found[arm] = inside
    return found


def look_inside(results: "Results", arms: list[str]) -> dict[str, Inside]:
    """Returns what the first finished run of each arm shows inside; computes and keeps what is not known yet.

    A run without a checkpoint is passed over; one that cannot be looked into says why in `trouble`.
    """
    found: dict[str, Inside] = {}
    for arm in arms:
        one = next((one for one in results.of_arm(arm) if one.state == "done" and _has_checkpoint(one.path)), None)
        if one is not None:
            found[arm] = _read(one) or _computed(one)
    return found


def _has_checkpoint(run: Path) -> bool:
    """Returns whether a run has saved its state."""
    return any(path.name.isdecimal() for path in (run / "checkpoints").glob("*"))


def _read(one: "Trial") -> Inside | None:
    """Returns what was found of a run earlier, None if nothing was or the file is none of ours."""
    try:
        found = read_json(one.path / FILE)
        sites = [{key: decode_number(value) for key, value in row.items()} for row in found["sites"]]
        return Inside(one.seed, int(found["step"]), sites, dict(found["tensors"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _computed(one: "Trial") -> Inside:
    """Looks into a run and keeps what is found."""
    from precision_lab.training.insides import look_inside as look

    if isinstance(one.config, ProbeRun):
        return Inside(one.seed, trouble="a probe has no model")
    try:
        found = look(one.config, one.path / "checkpoints")
    except Exception as error:  # A report does without what cannot be computed, and says so.
        return Inside(one.seed, trouble=" ".join(f"{type(error).__name__}: {error}".split())[:200])
    if found is None:
        return Inside(one.seed, trouble="no checkpoint")
    sites = [{key: encode_number(value) for key, value in row.items()} for row in found["sites"]]
    (one.path / FILE).parent.mkdir(exist_ok=True)
    write_json(one.path / FILE, {**found, "sites": sites})
    return _read(one) or Inside(one.seed, trouble="could not be kept")


def worst_site(inside: Inside) -> str:
    """Returns the site with the smallest ratio in words, empty without sites."""
    finite = [row for row in inside.sites if math.isfinite(row["sqnr_db"])]
    if not finite:
        return ""
    row = min(finite, key=lambda row: row["sqnr_db"])
    return f"{row['site']} at {row['sqnr_db']:.0f} dB"
