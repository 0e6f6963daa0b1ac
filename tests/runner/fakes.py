"""Training that takes no time: what the runner calls, with results known beforehand and failures on demand."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

EXPERIMENT = {
    "name": "toy",
    "model": {"kind": "mlp", "hidden": [4]},
    "data": {"kind": "digits", "batch": 8},
    "optim": {"kind": "sgd", "lr": 0.1},
    "train": {"steps": 10, "log_every": 5},
    "arms": {"float32": {}, "float16": {"policy": "float16_mixed"}, "bfloat16": {"policy": "bfloat16_mixed"}},
    "seeds": [0, 1, 2],
    "claims": [{"kind": "gt", "a": "float16", "b": "float32", "metric": "eval/loss", "margin": 0.1}],
}
"""Three arms, three seeds; under `FakeTraining` float16 is worse by 0.5 and bfloat16 by 0.01."""

PENALTY = {"float32": 0.0, "float16": 0.5, "bfloat16": 0.01}


def compute_dtype(config) -> str:
    """Returns what the policy of a run computes in."""
    return next((name for name in ("bfloat16", "float16") if f"compute={name}" in f"{config.policy}"), "float32")


def loss_at(config, step: int) -> float:
    """Returns the loss that a run reports after some steps: falls with the steps, differs by seed and format."""
    penalty = PENALTY[compute_dtype(config)] * (1 + 0.02 * math.cos(config.seed))
    return 2.0 / (1 + step) + 0.1 * math.sin(config.seed + 1) + penalty


@dataclass
class FakeTraining:
    """Stands for `precision_lab.training`.

    Attributes:
      failures: by compute dtype, an exception to raise; at step `die_at`.
      diverging: compute dtypes whose runs diverge at step `die_at`.
      last_loss: by compute dtype, a value to report at the last step instead.
      refused: by compute dtype, what `check` complains about.
      trained: the runs that were trained, as (compute dtype, seed, first step).
      starts: of each of them the folder of checkpoints that it was to begin from.
    """

    failures: dict[str, BaseException] = field(default_factory=dict)
    diverging: set[str] = field(default_factory=set)
    last_loss: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    die_at: int = 7
    trained: list[tuple[str, int, int]] = field(default_factory=list)
    starts: list[Path | None] = field(default_factory=list)

    def check(self, config) -> None:
        """Refuses what the test wants refused."""
        if compute_dtype(config) in self.refused:
            raise ValueError(self.refused[compute_dtype(config)])

    def train(
        self, config, *, checkpoint_dir: Path, sink, on_step=None, start_from: Path | None = None, should_stop=None
    ):
        """Writes the rows of a run, saving every four steps, going on from what was saved."""
        self.starts.append(start_from)
        kind, saved = compute_dtype(config), checkpoint_dir / "step.json"
        start = json.loads(saved.read_text()) if saved.exists() else 0
        self.trained.append((kind, config.seed, start))
        sink.restart(start)
        for step in range(start, config.train.steps + 1):
            if step == self.die_at and kind in self.failures:
                raise self.failures[kind]
            if step == self.die_at and kind in self.diverging:
                return SimpleNamespace(status="diverged", step=step, metrics={"eval/loss": math.nan}, last_finite=4)
            if step > start or step == 0:
                loss = loss_at(config, step)
                if step == config.train.steps:
                    loss = self.last_loss.get(kind, loss)
                sink.write({"step": step, "split": "eval", "loss": loss, "accuracy": 1 - loss / 4})
                sink.write({"step": step, "split": "train", "loss": loss, "loss_scale": 2.0**step})
            if step % 4 == 0:
                saved.write_text(json.dumps(step))
            if on_step:
                on_step(step, loss_at(config, step))
        return SimpleNamespace(status="done", step=config.train.steps, metrics={"eval/loss": loss})


class SilentProgress:
    """Progress that nobody watches, but that remembers the states runs ended in."""

    ended: list[str] = []  # noqa: RUF012 (shared on purpose, so that tests can read it)

    def __init__(self, total_runs: int = 1) -> None:
        self.total_runs = total_runs
        type(self).ended = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def start_run(self, label, total_steps, run=""):
        """Does nothing."""

    def step(self, step, loss, run=""):
        """Does nothing."""

    def end_run(self, status, run=""):
        """Remembers the state."""
        type(self).ended.append(status)


def install(monkeypatch, fake: FakeTraining, *, plots: bool = False) -> None:
    """Puts the fake in the place of training, data and progress; plots take most of the time, and are left out."""
    import precision_lab.data
    import precision_lab.training
    from precision_lab.runner import execute
    from precision_lab.runner import plots as drawing

    monkeypatch.setattr(precision_lab.training, "train", fake.train, raising=False)
    monkeypatch.setattr(precision_lab.training, "check", fake.check, raising=False)
    monkeypatch.setattr(precision_lab.data, "load", lambda config: None, raising=False)
    progress = SimpleNamespace(RunProgress=SilentProgress)
    monkeypatch.setitem(sys.modules, "precision_lab.training.progress", progress)
    monkeypatch.setattr(execute, "fingerprint", lambda: {"jax": "1.2.3", "device": "cpu", "commit": None})
    if not plots:
        monkeypatch.setattr(drawing, "curves", lambda *_, **__: "<svg></svg>")
        monkeypatch.setattr(drawing, "finals", lambda *_, **__: "<svg></svg>")
