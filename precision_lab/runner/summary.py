"""What every report says in words: what was varied, on what it ran, and how to run it again."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from precision_lab.policy import PRESETS
from precision_lab.runner.identity import plain, policy_name, run_id
from precision_lab.training import ProbeRun

if TYPE_CHECKING:
    from precision_lab.runner.results import Results

_FLOAT32 = str(PRESETS["float32"].policy)

TIMELINES = ("train/loss_scale", "train/skipped_steps", "train/zero_grad_fraction", "train/unchanged_fraction")
"""What training logs about the numbers themselves; shown where some run logged it."""


def counted(count: int, noun: str) -> str:
    """Returns `1 run`, or `2 runs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def varied(results: "Results") -> dict[str, dict[str, Any]]:
    """Returns for each arm the dotted keys in which it differs from the baseline, and its values there.

    A key that only the baseline has is given as None. A probe beside a training, or the other way round, differs in
    all that it is.
    """
    runs = {arm: next(iter(seeds.values())) for arm, seeds in results.experiment.runs.items()}
    base = runs[results.experiment.baseline_arm]
    flat_base = _flat_run(base)
    nothing = {"seed": flat_base["seed"]}
    return {arm: _changes(flat_base if type(run) is type(base) else nothing, run) for arm, run in runs.items()}


def _changes(base: Mapping[str, Any], run: BaseModel) -> dict[str, Any]:
    """Returns what a run changes; of another kind only what is not its default, the kind as `loss_scale=dynamic`.

    A probe among trainings, or a training among probes, says what it is itself.
    """
    own = _flat_run(run)
    if ("probe.kind" in own) != ("probe.kind" in base):
        base = {"seed": base["seed"]}
    changed = {key: own.get(key) for key in {**own, **base} if own.get(key) != base.get(key)}
    kinds = {key.removesuffix(".kind") for key in changed if key.endswith(".kind")}
    implied = defaults(run) | (set(base) - set(own))
    kept = {key: value for key, value in changed.items() if key.rpartition(".")[0] not in kinds or key not in implied}
    return {key.removesuffix(".kind"): value for key, value in kept.items()}


def defaults(model: BaseModel, prefix: str = "") -> set[str]:
    """Returns the dotted keys that have their default value, kinds apart."""
    found: set[str] = set()
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            found |= defaults(value, f"{prefix}{name}.")
        elif name != "kind" and value == field.default:
            found.add(f"{prefix}{name}")
    return found


def _flat_run(run: BaseModel) -> dict[str, Any]:
    """Returns a run's configuration with dotted keys, its policy by name if it has one."""
    keys = flat(plain(run) | _start_in_words(run) | _evals_in_words(run) | _transforms_in_words(run))
    return {**keys, "policy": _policy_in_words(keys["policy"])} if "policy" in keys else keys


def _policy_in_words(policy: str) -> str:
    """Returns a policy's name, or else what it says beyond float32."""
    return policy_name(policy).removeprefix(f"{_FLOAT32},")


def _start_in_words(run: BaseModel) -> dict[str, Any]:
    """Returns where a run begins with the arm's name in place of its whole configuration."""
    start = getattr(run, "start", None)
    if start is None:
        return {}
    return {"start": {"arm": start.arm or run_id(start.run), **({"merge": True} if start.merge else {})}}


def _evals_in_words(run: BaseModel) -> dict[str, Any]:
    """Returns further policies without what they have in common with float32."""
    evals = getattr(run, "evals", None) or {}
    return {"evals": {name: _policy_in_words(one) for name, one in evals.items()}}


def _transforms_in_words(run: BaseModel) -> dict[str, Any]:
    """Returns transforms with what is not their default, as `relu_rescale(first=..., exponent=6)`."""
    found = []
    for one in getattr(run, "transforms", ()):
        implied = defaults(one) | {"kind"}
        keys = ", ".join(f"{key}={value}" for key, value in plain(one).items() if key not in implied)
        found.append(f"{one.kind}({keys})")
    return {"transforms": " ".join(found)} if found else {}


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one mapping with dotted keys."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    items = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in data.items()]
    return {key: value for item in items for key, value in item.items()}


def change_text(changes: Mapping[str, Any]) -> str:
    """Returns changes as `policy=float16_pure, train.loss_shift=16`."""
    return ", ".join(f"{key}={_value_text(value)}" for key, value in changes.items())


def _value_text(value: Any) -> str:
    """Returns a value as it would be written after `--set`."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return str(value)


def shared(results: "Results") -> dict[str, Any]:
    """Returns the dotted keys that all arms agree on and that are not defaults, without the seed.

    Where there are trainings and probes, those of the baseline's sort count.
    """
    runs = {arm: next(iter(seeds.values())) for arm, seeds in results.experiment.runs.items()}
    run = runs[results.experiment.baseline_arm]
    alike = [arm for arm, other in runs.items() if type(other) is type(run)]
    changed = {key for arm, changes in varied(results).items() if arm in alike for key in changes} | {"seed"}
    implied = defaults(run) | {key for key in _flat_run(run) if _within(key, changed)}
    return {key.removesuffix(".kind"): value for key, value in _flat_run(run).items() if key not in implied}


def sharing(results: "Results") -> str:
    """Returns whom `shared` speaks of, in words."""
    probes = {arm: isinstance(next(iter(seeds.values())), ProbeRun) for arm, seeds in results.experiment.runs.items()}
    if len(set(probes.values())) == 1:
        return "All arms"
    return "All probes" if probes[results.experiment.baseline_arm] else "All trainings"


def _within(key: str, changed: set[str]) -> bool:
    """Returns whether a dotted key, or something around it, was changed."""
    parts = key.split(".")
    return any(".".join(parts[:end]) in changed for end in range(1, len(parts) + 1))


def environments(results: "Results") -> dict[str, list[str]]:
    """Returns the fingerprint of all attempts: by key every value that occurs, one where they agree."""
    found: dict[str, list[str]] = {}
    for one in results.trials:
        for key, value in (item for env in one.envs for item in env.items()):
            text = "" if value is None else str(value)
            if text not in found.setdefault(key, []):
                found[key].append(text)
    return {key: values for key, values in found.items() if values != [""]}


def command(results: "Results", arm: str | None = None, *, with_out: bool = True) -> str:
    """Returns the command that runs the experiment, or one arm of it, again.

    Pages that are published leave out the folder of results, which is a matter of one machine.
    """
    words = results.experiment.words or (shlex.quote(str(results.folder)),)
    out = () if str(results.out) == "runs" or not with_out else ("--out", shlex.quote(str(results.out)))
    if arm is not None:
        first = words.index("--arm") if "--arm" in words else len(words)
        words = (*words[:first], "--arm", shlex.quote(arm))
    return " ".join(("precision-lab run", *words, *out))


def claimed(results: "Results") -> str:
    """Returns how many claims were reproduced, in words."""
    verdicts = [one.verdict for one in results.verdicts]
    if not verdicts:
        return "no claims to judge"
    parts = [f"{verdicts.count('reproduced')} of {len(verdicts)} claims reproduced"]
    parts += [f"{count} {text}" for text, count in (
        ("not reproduced", verdicts.count("not_reproduced")), ("inconclusive", verdicts.count("inconclusive"))
    ) if count]  # fmt: skip
    return ", ".join(parts)


def run_count(results: "Results") -> str:
    """Returns how many runs there are and how many of them did not finish, in words."""
    unfinished = [one for one in results.trials if one.state != "done"]
    numbers = (len(results.experiment.arms), len(results.experiment.seeds), len(results.trials))
    named = zip(numbers, ("arm", "seed", "run"), strict=True)
    text = ", ".join(f"{number} {name}{'' if number == 1 else 's'}" for number, name in named)
    return f"{text}, {len(unfinished)} of them not finished" if unfinished else text


def environment_spread(results: "Results") -> str:
    """Returns in words that the runs come from several environments and what differs; empty if they do not."""
    differing = [key for key, values in environments(results).items() if len(values) > 1]
    return f", from several environments ({', '.join(differing)} differ)" if differing else ""
