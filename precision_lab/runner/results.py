"""The results of an experiment: what each run reached, the verdict on each claim, and tables of both.

Everything is read from the run directories; an experiment that has run only in part has results in part.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precision_lab.runner.claim import Diverged, Term, Verdict
from precision_lab.runner.claims import Claim
from precision_lab.runner.clock import read_clock
from precision_lab.runner.config import ExperimentConfig
from precision_lab.runner.identity import run_id
from precision_lab.runner.metrics import Series, encode_number
from precision_lab.runner.pairing import unpaired
from precision_lab.runner.rows import Cell, Row, row_json
from precision_lab.runner.rundir import RunDir, run_dir
from precision_lab.runner.stats import Mean, mean_interval
from precision_lab.runner.tree import suggestion
from precision_lab.training import AnyRun

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]

    from precision_lab.runner.drawing import Picture
    from precision_lab.runner.terminal import TextTable


@dataclass(frozen=True)
class Trial:
    """One run of one arm.

    Attributes:
      state: `done`, `diverged`, `failed`, `interrupted`, `stopped` (its process is gone), `running` or `queued`.
      step: the last step reached.
      error: for a failed run, the last line of its traceback.
      envs: the different environments of its attempts, that of the last one last.
      series: every logged metric by its name, `split/metric`.
      seconds: of training, by step; empty where no clock was kept.
    """

    arm: str
    seed: int
    config: AnyRun
    run_id: str
    path: Path
    state: str
    step: int
    attempt: int
    error: str
    envs: list[dict[str, Any]] = field(repr=False)
    series: dict[str, Series] = field(repr=False)
    duration_s: float | None = None
    seconds: dict[int, float] = field(default_factory=dict, repr=False)

    def value(self, metric: str, reduce: str = "last", at: int | None = None) -> float | str:
        """Returns a metric reduced over the run, or at one step, or in words why there is none."""
        if self.state != "done":
            return self.trouble()
        if metric not in self.series:
            return f"{metric} was not logged"
        if at is None:
            return self.series[metric].reduce(reduce)
        found = self.series[metric].at(at)
        return f"{metric} was not logged at step {at}" if found is None else found

    def trouble(self) -> str:
        """Returns what kept the run from finishing, empty for a finished one."""
        if self.state == "diverged":
            return Diverged(f"diverged at step {self.step}")
        if self.state == "failed":
            return f"failed: {self.error}" if self.error else "failed"
        return {"done": "", "queued": "not run"}.get(self.state, f"{self.state} at step {self.step}")


class Results:
    """What an experiment has brought so far; `run` returns it, and `read` reads it back."""

    def __init__(self, experiment: ExperimentConfig, trials: Sequence[Trial], out: Path) -> None:
        """Holds the trials of every arm and seed of an experiment, in its order."""
        self.experiment = experiment
        self.trials = list(trials)
        self.out = Path(out)
        self._means: dict[tuple[str, str], Mean | None] = {}

    @property
    def folder(self) -> Path:
        """Where the report of the experiment lies."""
        return self.out / self.experiment.id

    @cached_property
    def _by_arm(self) -> dict[str, list[Trial]]:
        """The runs of each arm, by seed."""
        found: dict[str, list[Trial]] = {}
        for one in self.trials:
            found.setdefault(one.arm, []).append(one)
        return found

    def trial(self, arm: str, seed: int) -> Trial:
        """Returns one run."""
        for one in self.of_arm(arm):
            if one.seed == seed:
                return one
        raise ValueError(f"no run of arm {arm!r} with seed {seed} in {self.experiment.name}.")

    def of_arm(self, arm: str) -> list[Trial]:
        """Returns the runs of one arm, by seed.

        Raises:
          ValueError: an arm that is not there.
        """
        if arm not in self._by_arm:
            raise ValueError(f"no arm {arm!r} in {self.experiment.name}{suggestion(arm, self._by_arm, what='arms')}")
        return self._by_arm[arm]

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """The verdict on each claim, in the order of the configuration."""
        return [self._verdict(claim) for claim in self.experiment.claims]

    def _verdict(self, claim: Claim) -> Verdict:
        """Returns the verdict on one claim; says so if its arms share no initialisation or no batches."""
        verdict = claim.judge(self._value, self.experiment.seeds)
        first = [next(iter(self.experiment.runs[arm].values())) for arm in claim.arms_named()]
        differing = unpaired(first) if claim.pairs and verdict.numbers else []
        if not differing:
            return verdict
        words = f"not paired: {', '.join(differing)} {'differs' if len(differing) == 1 else 'differ'}"
        return replace(verdict, because=f"{verdict.because}; {words}")

    def _value(self, term: Term, seed: int) -> float | str:
        """Returns the number that a term of a claim names, or in words why there is none."""
        return self.trial(term.arm, seed).value(term.metric, term.reduce or "last", term.at)

    @cached_property
    def rows(self) -> list[Row]:
        """The result table: one row for each arm."""
        return [self._row(arm) for arm in self.experiment.arms]

    def _row(self, arm: str) -> Row:
        """Returns one arm's row."""
        trials = self.of_arm(arm)
        states = [one.state for one in trials if one.state != "done"]
        troubles = {state: states.count(state) for state in dict.fromkeys(states)}
        cells = {metric: self._cell(arm, metric) for metric in self.experiment.columns}
        return Row(arm, len(trials) - len(states), len(trials), troubles, cells)

    def _cell(self, arm: str, metric: str) -> Cell:
        """Returns one metric of one arm."""
        if metric not in self.experiment.known_metrics([arm]):
            return Cell(None, None, expected=False)
        own, base = self.finals(arm, metric), self.finals(self.experiment.baseline_of(arm), metric)
        paired = [own[seed] - base[seed] for seed in own if seed in base]
        difference = None if arm == self.experiment.baseline_arm else mean_interval(paired)
        return Cell(mean_interval(list(own.values())), difference)

    def finals(self, arm: str, metric: str) -> dict[int, float]:
        """Returns the last value of a metric by seed, for the runs that finished."""
        values = {one.seed: one.value(metric) for one in self.of_arm(arm)}
        return {seed: value for seed, value in values.items() if not isinstance(value, str)}

    def mean(self, arm: str, metric: str) -> Mean | None:
        """Returns the mean of a metric's last values over the seeds that finished, and its interval."""
        if (arm, metric) not in self._means:
            self._means[arm, metric] = mean_interval(list(self.finals(arm, metric).values()))
        return self._means[arm, metric]

    @cached_property
    def bits(self) -> dict[str, float | None]:
        """True bits per parameter of each arm, as `convert` stores its model; None where that cannot be told."""
        return {arm: _bits(next(iter(runs.values()))) for arm, runs in self.experiment.runs.items()}

    @property
    def exit_code(self) -> int:
        """0 if every run finished, 4 if some diverged, 3 if some failed or did not run."""
        states = {one.state for one in self.trials}
        return 3 if states - {"done", "diverged"} else 4 if "diverged" in states else 0

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns one plain mapping per run: arm, point of the sweep, seed, run_id, state, last metrics."""
        points = self.experiment.points
        return [
            {
                "arm": one.arm, **points.get(one.arm, {}),
                "seed": one.seed, "run_id": one.run_id, "state": one.state, "step": one.step,
                **{name: series.values[-1] for name, series in sorted(one.series.items())},
            }
            for one in self.trials
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data for JSON, numbers that are not finite as text."""
        runs = [{key: encode_number(value) for key, value in row.items()} for row in self.to_dicts()]
        return {
            "experiment": self.experiment.name,
            "id": self.experiment.id,
            "folder": str(self.folder),
            "baseline": self.experiment.baseline_name,
            "arms": [row_json(row) for row in self.rows],
            "runs": runs,
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
        }

    def frame(self) -> "pandas.DataFrame":
        """Returns a pandas frame with one row per run: arm, point of the sweep, seed, state, last metrics.

        Raises:
          ImportError: pandas is not installed.
        """
        return _pandas("frame()", "to_dicts()").DataFrame(self.to_dicts())

    def metrics_frame(self) -> "pandas.DataFrame":
        """Returns a pandas frame with one row per run and step, a column for each metric, as `split/metric`.

        Raises:
          ImportError: pandas is not installed.
        """
        pandas = _pandas("metrics_frame()", "trial(arm, seed).series")
        rows: list[dict[str, Any]] = []
        for one in self.trials:
            label = {"arm": one.arm, **self.experiment.points.get(one.arm, {}), "seed": one.seed}
            by_step: dict[int, dict[str, Any]] = {}
            for name, series in one.series.items():
                for step, value in zip(series.steps, series.values, strict=True):
                    by_step.setdefault(step, {})[name] = value
            rows += [{**label, "step": step, **by_step[step]} for step in sorted(by_step)]
        return pandas.DataFrame(rows)

    def plot(self, *metrics: str) -> "Picture":
        """Returns the learning curves of metrics, the columns of the table if none is named; shows in a notebook.

        Raises:
          ValueError: a metric that no run logged.
        """
        from precision_lab.runner.plots import curve_picture

        picture = curve_picture(self, self._logged(metrics or self.experiment.columns))
        assert picture is not None, "some run logged each of the metrics"
        return picture

    def pareto(self, metric: str = "") -> "Picture":
        """Returns true bits per parameter against a metric, by default the first column, with the frontier marked.

        Raises:
          ValueError: a metric that no run logged, or no arm with a number for both.
        """
        from precision_lab.runner.number_plots import pareto_picture

        [name] = self._logged([metric or self.experiment.columns[0]])
        picture = pareto_picture(self, name)
        if picture is None:
            raise ValueError(f"pareto({name!r}) needs a metric with a better direction and arms with finished runs.")
        return picture

    def _logged(self, metrics: Sequence[str]) -> list[str]:
        """Returns metrics, after making sure that some run logged each of them."""
        known = {name for one in self.trials for name in one.series}
        for metric in metrics:
            if metric not in known:
                raise ValueError(f"no run logged {metric!r}{suggestion(metric, known, what='metrics')}")
        return list(metrics)

    def table(self) -> "TextTable":
        """Returns the result table with intervals over seeds; prints as text, and shows in a notebook."""
        from precision_lab.runner.terminal import result_table

        return result_table(self)

    def report(self, path: str | os.PathLike[str] | None = None, *, look_inside: bool = False) -> Path:
        """Writes the report and returns where it is.

        Args:
          path: an `.html`, `.md`, `.csv` or `.tex` file to write just that, a folder for all of them, None for the
            experiment's own folder.
          look_inside: first load the final checkpoint of one run of each arm (of at most 16) for the heat map and the
            histograms, which are kept; without it only what was looked into before is shown.
        """
        from precision_lab.runner.insides import MOST_ARMS
        from precision_lab.runner.insides import look_inside as look
        from precision_lab.runner.plots import shown_arms
        from precision_lab.runner.report import write_report

        if look_inside:
            look(self, shown_arms(self, MOST_ARMS))
        return write_report(self, Path(path) if path is not None else self.folder)

    def __repr__(self) -> str:
        finished = sum(one.state == "done" for one in self.trials)
        return f"Results({self.experiment.name}: {finished} of {len(self.trials)} runs done, in {self.folder})"

    def __str__(self) -> str:
        from precision_lab.runner.terminal import verdict_lines

        return "\n".join([str(self.table()), *verdict_lines(self)])

    def _repr_html_(self) -> str:
        """Shows the result table and the verdicts in a notebook."""
        from precision_lab.runner.html import fragment

        return fragment(self)


def _pandas(what: str, instead: str) -> Any:
    """Returns pandas.

    Raises:
      ImportError: it is not installed; says what to use in its place.
    """
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError:
        message = f"{what} needs pandas: pip install 'precision-lab[notebook]'. Without it, {instead} has the same."
        raise ImportError(message) from None
    return pandas


def _bits(run: AnyRun) -> float | None:
    """Returns the true bits per parameter of a run's model, None where its shapes cannot be traced."""
    from precision_lab.training.size import bits_per_parameter

    try:
        return bits_per_parameter(run)
    except Exception:  # A policy or model that cannot be traced is told so when it runs; a report does without.
        return None


def read(experiment: ExperimentConfig, out: str | os.PathLike[str] = "runs") -> Results:
    """Returns the results of an experiment as far as its runs have come; runs nothing."""
    out = Path(out)
    trials = [
        _read_trial(arm, seed, config, run_dir(out, config))
        for arm, seeds in experiment.runs.items()
        for seed, config in seeds.items()
    ]
    return Results(experiment, trials, out)


def _read_trial(arm: str, seed: int, config: AnyRun, run: RunDir) -> Trial:
    """Returns what one run directory holds."""
    run.refuse_other(config)
    status, summary, series = run.status(), run.summary(), run.series()
    step = summary.get("step") or max((one.steps[-1] for one in series.values()), default=0)
    return Trial(
        arm=arm, seed=seed, config=config, run_id=run_id(config), path=run.path, state=status["state"], step=step,
        attempt=status.get("attempt", 0), error=status.get("error") or "", envs=run.envs(), series=series,
        duration_s=summary.get("duration_s"), seconds=read_clock(run.path),
    )  # fmt: skip
