"""MLflow: one run for each, in `mlflow.db` beside the folder of all runs, or where `MLFLOW_TRACKING_URI` says.

`mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` shows them.
"""

import logging
import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from precision_lab.runner.trackers import Tracked

EXPERIMENT = "precision_lab"
TAG = "precision_lab.run_id"
_STATUS = {"done": "FINISHED", "diverged": "FINISHED", "failed": "FAILED"}


class Mlflow:
    """Writes one run of MLflow, through a client of its own, so that nothing global changes."""

    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""

    def start(self, run: Tracked) -> None:
        """Creates a run, and deletes that of an earlier attempt."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in ("mlflow", "alembic"):  # They tell of every table they create.
            logging.getLogger(name).setLevel(logging.WARNING)
        root = run.folder.absolute().parent.parent
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        self._client = import_module("mlflow.tracking").MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        found = experiment.experiment_id if experiment else self._create(root)
        for earlier in self._client.search_runs([found], filter_string=f"tags.`{TAG}` = '{run.id}'"):
            self._client.delete_run(earlier.info.run_id)
        self._id = self._client.create_run(found, run_name=run.label, tags={TAG: run.id}).info.run_id
        for key, value in run.config.items():
            self._client.log_param(self._id, key, str(value)[:500])

    def _create(self, root: Path) -> str:
        """Creates the experiment, whose files lie beside the database; another process may be faster."""
        try:
            return self._client.create_experiment(EXPERIMENT, artifact_location=(root / "mlflow").as_uri())
        except Exception:
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
            return experiment.experiment_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a step in one transaction."""
        entity, now = import_module("mlflow.entities").Metric, int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[entity(name, value, now, step) for name, value in metrics.items()])

    def artifact(self, path: Path) -> None:
        """Keeps a copy of a file."""
        self._client.log_artifact(self._id, str(path))

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Nothing to add: MLflow shows the last value of each metric."""

    def finish(self, state: str) -> None:
        """Ends the run."""
        self._client.set_tag(self._id, "state", state)
        self._client.set_terminated(self._id, _STATUS.get(state, "KILLED"))


def make() -> Mlflow:
    """Returns a tracker that has not started."""
    return Mlflow()
