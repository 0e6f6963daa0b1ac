"""Small runs for the tests: a config that trains in milliseconds, and a sink that remembers."""

from precision_lab.training import RunConfig, train

HALF = "params=float16,compute=float16,output=float32"
BASE = {
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits", "batch": 32},
    "optim": {"kind": "sgd", "lr": 0.05, "momentum": 0.9},
    "train": {"steps": 20, "log_every": 5, "eval_every": 10, "eval_examples": 100},
}


def config(**changes) -> RunConfig:
    """Returns the small run with some keys changed; mappings are merged."""
    merged = dict(BASE)
    for key, value in changes.items():
        mergeable = isinstance(value, dict) and isinstance(BASE.get(key), dict) and "kind" not in value
        merged[key] = {**BASE[key], **value} if mergeable else value
    return RunConfig.model_validate(merged)


class MemorySink:
    """Keeps rows in a list, as the protocol says."""

    def __init__(self):
        self.rows = []
        self.restarts = []

    def restart(self, step):
        self.restarts.append(step)
        self.rows = [row for row in self.rows if row["step"] <= step]

    def write(self, row):
        self.rows.append(dict(row))

    def of(self, split):
        """Returns {step: row} of one split."""
        return {row["step"]: row for row in self.rows if row["split"] == split}


def run(*, folder=None, sink=None, on_step=None, **changes):
    """Returns (result, sink) of the small run."""
    sink = sink or MemorySink()
    return train(config(**changes), checkpoint_dir=folder, sink=sink, on_step=on_step), sink
