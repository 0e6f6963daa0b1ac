"""What quantization saves and what it costs: steps and inference under policies beside float32, Qwix and AQT.

Every row is a ratio of two things measured in turns in one run. Targets that suppose AMX are shown everywhere and
judged only where the processor has it. Peers that are not installed have no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from precision_lab.bench import quant_sweep, report
from precision_lab.bench.arms import Problem, call_of, chosen, compiled_anew, traced_anew
from precision_lab.bench.interleaved import Timing, environment, time_alternating, time_interleaved
from precision_lab.bench.quant_arms import PROBLEMS, SMALL, Make, group_size, inference, steps
from precision_lab.bench.quant_sweep import sweeps
from precision_lab.bench.targets import Target, judged

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "qwix", "aqtp")
UNIT = "ratio"
# Ours, and the peer that does the same.
PAIRS = {
    "float32": (
        ("W8A8 native", "Qwix W8A8"),
        ("W8A8 native", "AQT W8A8"),
        ("W8A8 native, float32 backward", "Qwix W8A8"),
        ("W8A8 native, float32 backward", "AQT W8A8"),
        ("W4A8 native", "Qwix W4A8"),
        ("W4A16", "Qwix W4A16"),
    ),
    "float32 inference": tuple(
        (f"inference {ours}", f"Qwix inference {peer}")
        for peer, *others in (
            ("int8 dynamic",),
            ("int4 weights", ", float32 products"),
            ("NF4 weights", ", float32 products"),
        )
        for ours in (peer, *(peer + other for other in others))
    ),
}
PREPARED = ("W8A8 simulated", "W8A8 native", "Qwix W8A8", "AQT W8A8")
_COMPILE_ROUNDS = 5


def _targets() -> dict[tuple[str, str, str], Target]:
    """Returns the targets by row, baseline and model."""
    of_models = {
        ("W8A8 simulated", "float32"): (1.10, 1.06, ""),
        ("W8A8 native", "float32"): (0.60, 0.70, "AMX"),
        ("W8A8 native", "Qwix W8A8"): (1.0, 1.0, "AMX"),
        ("W8A8 native", "AQT W8A8"): (1.0, 1.0, "AMX"),
        ("W4A8 native", "float32"): (0.70, 0.70, "AMX"),
        ("inference int8 dynamic", "float32 inference"): (0.20, 0.40, "AMX"),
        ("inference int8 static", "float32 inference"): (0.20, 0.40, "AMX"),
        ("inference int4 weights", "float32 inference"): (0.60, 0.60, "AMX"),
        ("inference NF4 weights", "float32 inference"): (0.60, 0.60, "AMX"),
        ("tracing W8A8 simulated", "tracing float32"): (1.9, 1.6, ""),
        ("compiling W8A8 simulated", "compiling float32"): (1.4, 1.4, ""),
        (quant_sweep.SEVEN, quant_sweep.ONE): (1.03, 1.03, ""),
        quant_sweep.PREPARED: (1.2, 1.2, ""),
    }
    return {
        (*row, model): Target(ratio, needs)
        for row, (*ratios, needs) in of_models.items()
        for model, ratio in zip(PROBLEMS, ratios, strict=True)
    }


TARGETS = _targets()

Tell = Callable[[str, int], None]
Found = dict[tuple[str, str], Timing]


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
      model: "mlp", "transformer" or "both".
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
        found: Found = {}
        for make in (steps, inference, sweeps):
            found |= _timed(make(problem), rounds, budget_s, lambda what, units, n=name: tell(f"{n}: {what}", units))
        found |= _prepared(problem, lambda what, units, n=name: tell(f"{n}: {what}", units))
        found |= quant_sweep.prepared(problem)
        tell(f"{name}: compiled {quant_sweep.SEVEN}", 1)
        rows += _rows(found, name, env)
    command = f"precision-lab bench quant --model {model} --rounds {rounds}{' --small' if small else ''}"
    return {
        "benchmark": "quant",
        "command": command,
        "problems": {name: _described(problem) for name, problem in problems.items()},
        "rounds": rounds,
        **env,
        "rows": rows,
    }


def work(model: str, rounds: int) -> int:
    """Returns the units of work that `run` tells of."""
    of_one = sum(len(make(SMALL["mlp"])) + rounds for make in (steps, inference, sweeps))
    return (of_one + 1 + 2 * len(_prepared_names(SMALL["mlp"]))) * len(chosen(PROBLEMS, model))


def title(result: Mapping[str, Any]) -> str:
    """Returns what the table of a result is called."""
    return f"Quantized steps and inference on {result['device']}"


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the benchmark as a Markdown page."""
    sizes = "".join(f"\n- {name}: {text}" for name, text in result["problems"].items())
    units = ", ".join(result["bfloat16_units"]) or "none"
    lead = (
        f"One step (loss, gradient, Adam) or one call of each arm, medians of up to {result['rounds']} interleaved "
        "rounds. Native steps multiply int8 forward and bfloat16 backward. Models for inference are converted first: "
        "weights packed, static scales calibrated on the batch. Groups of 4-bit weights have the size, at most 32 for "
        "int4 and 64 for NF4, that divides every width, for Qwix needs that and ours are the same. Two things differ: "
        "Qwix multiplies dequantized weights in float32, as our rows with float32 products do, and leaves codes one to "
        "a byte on a CPU, where ours are packed. A ratio without quartiles is computed from the ones above it."
        f"\n{sizes}\n\n"
        f"Units for bfloat16: {units}."
    )
    return report.markdown(result, title="Quantization beside its peers", lead=lead, unit=UNIT)


def _described(problem: Problem) -> str:
    """Writes a problem as one line."""
    fields = ", ".join(f"{key}={value}" for key, value in problem.config.model_dump().items() if key != "kind")
    groups = ", ".join(f"{group_size(problem, weights)} for {weights}" for weights in ("int4", "NF4"))
    sizes = f"batch {problem.batch} of {problem.spec.input_shape}, {problem.spec.num_classes} classes"
    return f"{fields}; {sizes}; groups of {groups}"


def _timed(arms: Mapping[str, Make], rounds: int, budget_s: float, tell: Tell) -> Found:
    """Returns the timings of arms against the first of them."""
    calls = {}
    for name, make in arms.items():
        tell(f"compiling {name}", 0)
        calls[name] = call_of(make())
        tell(f"compiled {name}", 1)
    against = next(iter(calls))
    timings = time_interleaved(
        calls, rounds=rounds, budget_s=budget_s, on_round=lambda: tell(f"timing against {against}", 1)
    )
    return {(timing.name, against): timing for timing in timings}


def _prepared_names(problem: Problem) -> list[str]:
    """Returns the arms whose tracing and compiling is timed."""
    return [name for name in steps(problem) if name in PREPARED]


def _prepared(problem: Problem, tell: Tell) -> Found:
    """Returns what tracing and compiling steps takes, against the step without quantization."""
    made, found = steps(problem), {}
    plain = made["float32"]()
    for name in _prepared_names(problem):
        arm = made[name]()
        options: dict[str, Any] = {"rounds": _COMPILE_ROUNDS}
        traced = [traced_anew(each) for each in (plain, arm)]
        tell(f"tracing {name}", 0)
        found[f"tracing {name}", "tracing float32"] = time_alternating(
            f"tracing {name}", lambda: traced_anew(plain), lambda arm=arm: traced_anew(arm), **options
        )
        tell(f"compiling {name}", 1)
        found[f"compiling {name}", "compiling float32"] = time_alternating(
            f"compiling {name}", *(lambda each=each: compiled_anew(each) for each in traced), **options
        )
        tell(f"compiled {name}", 1)
    return found


def _rows(found: Found, model: str, env: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of one model: what was timed, and what follows from it about peers."""

    def target(what: str, against: str) -> dict[str, Any]:
        return judged(TARGETS.get((what, against, model)), env)

    timed = [
        report.row(t, model=model, against=against, **target(t.name, against)) for (_, against), t in found.items()
    ]
    return timed + [
        report.derived(ours, ratio, model=model, against=peer, **target(ours, peer))
        for (ours, peer), ratio in _against_peers(found).items()
    ]


def _against_peers(found: Found) -> dict[tuple[str, str], float]:
    """Returns our ratios over those of the peers that are there."""
    return {
        (ours, peer): found[ours, against].ratio / found[peer, against].ratio
        for against, pairs in PAIRS.items()
        for ours, peer in pairs
        if (peer, against) in found
    }
