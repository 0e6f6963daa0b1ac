"""Groups: which arms of an experiment share one compiled program, and why the others do not.

Arms are in one group if they differ only in numbers that the compiled step takes as arguments (see
`training.numbers`): their seeds, the widths of their quantizers and simulated formats, learning rates and the like. A
group is compiled once, whichever executor runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from precision_lab.runner.summary import counted
from precision_lab.training.config import RunConfig

if TYPE_CHECKING:
    from precision_lab.runner.config import ExperimentConfig


@dataclass(frozen=True)
class Group:
    """Arms that share a program.

    Attributes:
      arms: their names, in the order of the experiment.
      runs: how many runs they have.
      structure: what they have in common: a config with a fixed value in place of every number that is an argument.
      reason: why they are not in the group before that is most like them; empty for the first group.
    """

    arms: tuple[str, ...]
    runs: int
    structure: Any
    reason: str = ""

    def __str__(self) -> str:
        """Returns one line."""
        programs = f"{', '.join(self.arms)}: {counted(self.runs, 'run')}, one program"
        return f"{programs} ({self.reason})" if self.reason else programs


def groups(experiment: ExperimentConfig) -> list[Group]:
    """Returns the groups of an experiment's arms, in the order of their first arms."""
    members: dict[Any, list[str]] = {}
    first: dict[Any, Any] = {}
    for arm, seeds in experiment.runs.items():
        config = next(iter(seeds.values()))
        structure = structure_of(config)
        members.setdefault(structure, []).append(arm)
        first.setdefault(structure, config)
    found: list[Group] = []
    for structure, arms in members.items():
        runs = sum(len(experiment.runs[arm]) for arm in arms)
        reason = _why_apart(first[structure], [(group.arms[0], first[group.structure]) for group in found])
        found.append(Group(tuple(arms), runs, structure, reason))
    return found


def structure_of(config: Any) -> Any:
    """Returns what runs must have in common to share a program; what trains no model shares it with its equals."""
    from precision_lab.training.numbers import static_part

    return static_part(config) if isinstance(config, RunConfig) else config


def describe(found: list[Group]) -> str:
    """Returns groups as lines for people."""
    total = sum(group.runs for group in found)
    head = f"{counted(total, 'run')} in {counted(len(found), 'compiled program')}"
    return "\n".join([head + ":", *(f"  {group}" for group in found)])


def _why_apart(config: Any, others: list[tuple[str, Any]]) -> str:
    """Returns how a run differs in structure from the one among others, named by their arms, that is most like it."""
    found = [(_differences(config, other), name) for name, other in others]
    if not found:
        return ""
    differing, name = min(found, key=lambda each: len(each[0]))
    return f"unlike {name}: {'; '.join(differing)}"


def _differences(config: Any, other: Any) -> list[str]:
    """Returns how the structures of two runs differ, in words."""
    from precision_lab.training.structure import structural_differences

    both = isinstance(config, RunConfig) and isinstance(other, RunConfig)
    return structural_differences(config, other) if both else ["it is another kind of run"]
