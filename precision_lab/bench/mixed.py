"""What a policy saves and what it costs: mixed-precision steps beside float32, jmp and Flax's own `dtype=`.

Every row is a ratio of two things measured in turns in one run, and says against what. Targets that suppose units for
bfloat16 are shown everywhere and judged only where the processor has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from precision_lab.bench import report
from precision_lab.bench.arms import PROBLEMS, SMALL, Problem, arms, call_of, chosen, compiled_anew, traced_anew
from precision_lab.bench.interleaved import Timing, environment, time_alternating, time_interleaved
from precision_lab.bench.targets import Target, judged

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "jmp")
UNIT = "ratio"
GROUPS = {
    "float32": (
        "policy float32",
        "policy bfloat16_mixed",
        "policy bfloat16_autocast",
        "jmp bfloat16",
        "Flax dtype=bfloat16",
        "loss scaling + master weights",
    ),
    "policy float32": ("observed every step", "observed when=, looking", "observed when=, not looking"),
    "update: adamw": ("update: loss scaling", "update: loss scaling + master weights"),
}
TRACE, COMPILE, EVERY_50 = "tracing policy float32", "compiling policy float32", "observed every 50 steps by when="
MIXED, PEERS = "policy bfloat16_mixed", ("jmp bfloat16", "Flax dtype=bfloat16")
_COMPILE_ROUNDS, _PREPARATIONS = 3, 2


_FASTER = Target(0.45, "AMX")
TARGETS = {
    ("policy float32", "float32"): Target(1.02),
    (MIXED, "float32"): _FASTER,
    **{(MIXED, peer): _FASTER._replace(ratio=0.6) for peer in PEERS},
    ("loss scaling + master weights", "float32"): Target(1.05),
    ("observed every step", "policy float32"): Target(1.10),
    (EVERY_50, "policy float32"): Target(1.01),
    (TRACE, "tracing float32"): Target(2.0),
    (COMPILE, "compiling float32"): Target(1.4),
}

_FOR_TRANSFORMERS = {target for target in TARGETS if target[0] == MIXED}

Tell = Callable[[str, int], None]


def run(
    *,
    model: str = "both",
    rounds: int = 10,
    budget_s: float = 8.0,
    small: bool = False,
    tell: Tell = lambda message, units: None,
) -> dict[str, Any]:
    """Returns the benchmark as JSON types: environment and one row for each comparison.

    Args:
      model: "transformer", "convnet" or "both".
      rounds: interleaved rounds; tracing and compiling have fewer.
      budget_s: seconds to spend on the calls of one arm, which has fewer rounds if it is slow.
      small: whether the models are tiny, to try the command; their ratios say nothing.
      tell: called with what is done now and how many units of work, of those that `work` counts, are done since the
        last call.

    Raises:
      ValueError: there is no such model.
    """
    env, problems = environment(PACKAGES), chosen(SMALL if small else PROBLEMS, model)
    rows = []
    for name, problem in problems.items():
        rows += _rows_of(
            name, problem, env, rounds, budget_s, lambda message, units, n=name: tell(f"{n}: {message}", units)
        )
    command = f"precision-lab bench mixed --model {model} --rounds {rounds}{' --small' if small else ''}"
    return {
        "benchmark": "mixed",
        "command": command,
        "problems": {name: _described(problem) for name, problem in problems.items()},
        "rounds": rounds,
        **env,
        "rows": rows,
    }


def work(model: str, rounds: int) -> int:
    """Returns the units of work that `run` tells of."""
    compiled = {*GROUPS, *(name for names in GROUPS.values() for name in names)}
    return (len(compiled) + rounds * len(GROUPS) + _PREPARATIONS) * len(chosen(PROBLEMS, model))


def title(result: Mapping[str, Any]) -> str:
    """Returns what the table of a result is called."""
    units = " and ".join(result["bfloat16_units"]) or "no units for bfloat16"
    return f"Training steps on {result['device']} ({units})"


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the benchmark as a Markdown page."""
    sizes = "".join(f"\n- {name}: {text}" for name, text in result["problems"].items())
    units = ", ".join(result["bfloat16_units"]) or "none"
    lead = (
        f"One step (loss, gradient, AdamW) of each arm, medians of up to {result['rounds']} interleaved rounds. "
        "`update:` is the optimizer's part alone. A ratio without quartiles is computed from the ones above it.\n"
        f"{sizes}\n\nUnits for bfloat16: {units}."
    )
    return report.markdown(result, title="Mixed-precision steps beside their peers", lead=lead, unit=UNIT)


def _described(problem: Problem) -> str:
    """Writes a problem as one line."""
    fields = ", ".join(f"{key}={value}" for key, value in problem.config.model_dump().items() if key != "kind")
    return f"{fields}; batch {problem.batch} of {problem.spec.input_shape}, {problem.spec.num_classes} classes"


def _rows_of(
    name: str, problem: Problem, env: Mapping[str, Any], rounds: int, budget_s: float, tell: Tell
) -> list[dict[str, Any]]:
    """Returns the rows of one model."""
    calls = {}
    for arm, make in arms(problem).items():
        tell(f"compiling {arm}", 0)
        calls[arm] = call_of(make())
        tell(f"compiled {arm}", 1)
    found: dict[tuple[str, str], Timing] = {}
    for against, others in GROUPS.items():
        tell(f"timing against {against}", 0)
        group = {each: calls[each] for each in (against, *others)}
        timings = time_interleaved(
            group, rounds=rounds, budget_s=budget_s, on_round=lambda a=against: tell(f"timing against {a}", 1)
        )
        found |= {(timing.name, against): timing for timing in timings}
    calls.clear()
    tell("tracing and compiling", 0)
    found |= _preparations(problem, tell)
    rows = [
        report.row(t, model=name, against=against, **_target(t.name, against, name, env))
        for (_, against), t in found.items()
    ]
    return rows + [
        report.derived(what, ratio, model=name, against=against, **_target(what, against, name, env))
        for (what, against), ratio in _computed(found).items()
    ]


def _computed(found: Mapping[tuple[str, str], Timing]) -> dict[tuple[str, str], float]:
    """Returns the ratios that follow from others."""
    to_float32 = {name: found[name, "float32"].ratio for name in (MIXED, *PEERS)}
    watched = [found[f"observed when=, {how}", "policy float32"].ratio for how in ("looking", "not looking")]
    peers = {(MIXED, peer): to_float32[MIXED] / to_float32[peer] for peer in PEERS}
    return {**peers, (EVERY_50, "policy float32"): (watched[0] + 49 * watched[1]) / 50}


def _target(what: str, against: str, model: str, env: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the target of a row, and what of it this machine lacks, as arguments of a row."""
    applies = model == "transformer" or (what, against) not in _FOR_TRANSFORMERS
    return judged(TARGETS.get((what, against)) if applies else None, env)


def _preparations(problem: Problem, tell: Tell) -> dict[tuple[str, str], Timing]:
    """Returns what tracing and compiling under the policy float32 takes, against the step without a policy."""
    pair = [arms(problem)[name]() for name in ("float32", "policy float32")]

    steps = [traced_anew(arm) for arm in pair]
    tracing = time_alternating(TRACE, *(lambda arm=arm: traced_anew(arm) for arm in pair), rounds=_COMPILE_ROUNDS)
    tell("compiling", 1)
    compiling = time_alternating(COMPILE, *(lambda s=s: compiled_anew(s) for s in steps), rounds=_COMPILE_ROUNDS)
    tell("compiled", 1)
    return {(TRACE, "tracing float32"): tracing, (COMPILE, "compiling float32"): compiling}
