"""At which steps a run writes rows of metrics, known before it runs. JAX is not imported here."""

from precision_lab.training.config import TrainConfig


def logs_at(train: TrainConfig, step: int) -> bool:
    """Returns whether a row of training metrics is written after so many steps."""
    return 0 < step <= train.steps and is_due(train, step, train.log_every)


def evaluates_at(train: TrainConfig, step: int) -> bool:
    """Returns whether a run is evaluated after so many steps; 0 is before the first."""
    asked = step == 0 or step in train.eval_at or is_due(train, step, train.eval_every)
    return 0 <= step <= train.steps and asked


def is_due(train: TrainConfig, step: int, every: int | None) -> bool:
    """Returns whether something that happens every so many steps, and after the last, happens after this one."""
    return step == train.steps or (every is not None and step % every == 0)
