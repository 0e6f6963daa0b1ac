"""Two runs, or two arms, in words: what differs in configuration, in environment, and in what they reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from precision_lab.runner.identity import plain, policy_name
from precision_lab.runner.metrics import encode_number
from precision_lab.runner.results import Trial
from precision_lab.runner.rundir import RunDir
from precision_lab.runner.stats import mean_interval
from precision_lab.runner.summary import change_text, flat
from precision_lab.training import AnyRun


@dataclass(frozen=True)
class Side:
    """One of the two: a run, or the runs of an arm by seed.

    Attributes:
      finals: by metric and then by seed, the last value.
    """

    name: str
    config: AnyRun
    states: tuple[str, ...] = ()
    envs: tuple[Mapping[str, Any], ...] = ()
    finals: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def side_of_run(run: RunDir) -> Side:
    """Returns one run as a side."""
    config = run.config()
    finals = {name: {config.seed: one.values[-1]} for name, one in sorted(run.series().items())}
    return Side(run.id, config, (run.status()["state"],), tuple(run.envs()), finals)


def side_of_arm(name: str, trials: Sequence[Trial]) -> Side:
    """Returns the runs of an arm as a side; those that did not finish have no last values."""
    finals: dict[str, dict[int, float]] = {}
    for one in trials:
        for metric, series in sorted(one.series.items()):
            if one.state == "done":
                finals.setdefault(metric, {})[one.seed] = series.values[-1]
    envs = tuple(env for one in trials for env in one.envs)
    return Side(name, trials[0].config, tuple(one.state for one in trials), envs, finals)


def difference(a: Side, b: Side) -> dict[str, Any]:
    """Returns what differs as plain data: `config`, `environment`, `metrics`, each by key a pair or a difference."""
    return {
        "a": a.name,
        "b": b.name,
        "states": [list(a.states), list(b.states)],
        "config": _config_difference(a, b),
        "environment": _environment_difference(a, b),
        "metrics": {name: _metric_difference(a, b, name) for name in sorted({*a.finals, *b.finals})},
    }


def _config_difference(a: Side, b: Side) -> dict[str, list[Any]]:
    """Returns the dotted keys in which the configurations differ; seeds only of two single runs."""
    left, right = _flat(a), _flat(b)
    keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    return {key: [left.get(key), right.get(key)] for key in keys}


def _flat(side: Side) -> dict[str, Any]:
    """Returns a configuration with dotted keys."""
    found = flat(plain(side.config))
    if len(side.states) != 1:
        found.pop("seed", None)
    return {**found, "policy": policy_name(found["policy"])} if "policy" in found else found


def _environment_difference(a: Side, b: Side) -> dict[str, list[list[Any]]]:
    """Returns by key the values that occur on each side, where they are not the same."""
    keys = dict.fromkeys(key for side in (a, b) for env in side.envs for key in env)
    found = {key: [_values(side, key) for side in (a, b)] for key in keys}
    return {key: values for key, values in found.items() if values[0] != values[1]}


def _values(side: Side, key: str) -> list[Any]:
    """Returns the values of one key over the environments of a side, each once."""
    return list(dict.fromkeys(env.get(key) for env in side.envs))


def _metric_difference(a: Side, b: Side, name: str) -> dict[str, Any]:
    """Returns the means of a metric, and the mean difference b - a over the seeds that both have."""
    left, right = a.finals.get(name, {}), b.finals.get(name, {})
    both = mean_interval([right[seed] - left[seed] for seed in left if seed in right])
    one_each = len(left) == len(right) == 1 and both is None
    if one_each:  # Two runs of different seeds: a plain difference, not a paired one.
        both = mean_interval([next(iter(right.values())) - next(iter(left.values()))])
    means = [mean_interval(list(values.values())) for values in (left, right)]
    return {
        "a": None if means[0] is None else encode_number(means[0].mean),
        "b": None if means[1] is None else encode_number(means[1].mean),
        "difference": None if both is None else encode_number(both.mean),
        "text": "" if both is None else both.text(signed=True),
        "equal": both is not None and both.mean == 0 and not both.half_width,
        "seeds": 0 if both is None else both.n,
    }


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Returns a difference in words, one line each."""
    a, b = found["a"], found["b"]
    lines = [f"a is {a} ({_states(found['states'][0])})", f"b is {b} ({_states(found['states'][1])})", ""]
    changed = [f"  {key}: {_text(old)} in a, {_text(new)} in b" for key, (old, new) in found["config"].items()]
    lines += ["configuration differs in", *changed] if changed else ["the configurations are the same"]
    moved = [f"  {key}: {_list(old)} for a, {_list(new)} for b" for key, (old, new) in found["environment"].items()]
    lines += ["", "environment differs in", *moved] if moved else ["", "they ran in the same environment"]
    if found["config"] == {} and moved:
        lines.append("  so a difference below comes from there, or from the order in which sums are taken.")
    metrics = [_metric_text(name, one) for name, one in found["metrics"].items()]
    return [*lines, "", "last metrics, b against a", *metrics] if metrics else lines


def _metric_text(name: str, one: Mapping[str, Any]) -> str:
    """Returns one metric in words."""
    if one["difference"] is None:
        missing = [side for side in ("a", "b") if one[side] is None]
        return f"  {name}: not reached by {' and '.join(missing)}" if missing else f"  {name}: no seed in common"
    if one["equal"] and one["a"] == one["b"]:
        return f"  {name}: equal, {one['a']:.6g}"
    seeds = f" over {one['seeds']} seeds" if one["seeds"] > 1 else ""
    numbers = [value if isinstance(value, str) else f"{value:.6g}" for value in (one["a"], one["b"])]
    return f"  {name}: {numbers[0]} to {numbers[1]}, {one['text']}{seeds}"


def _states(states: Sequence[str]) -> str:
    """Returns `done`, or `3 runs: 2 done, 1 failed`."""
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return states[0] if len(states) == 1 else f"{len(states)} runs: {counts}"


def _text(value: Any) -> str:
    """Returns a value as after `--set`."""
    return change_text({"": value})[1:]


def _list(values: Sequence[Any]) -> str:
    """Returns values with slashes between them."""
    return " / ".join("none" if value in (None, "") else str(value) for value in values) or "unknown"
