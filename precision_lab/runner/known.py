"""Which metrics a run logs, known before it runs, so that a claim about any other is refused at once."""

from precision_lab.training.config import RunConfig

_EVAL = ("loss", "accuracy")
_TRAIN = ("loss", "grad_norm", "loss_scale", "skipped_steps", "zero_grad_fraction", "unchanged_fraction")


def metric_names(run: RunConfig) -> set[str]:
    """Returns the names, `split/metric`, of everything that the training of a run logs."""
    evaluated = {f"{split}/{name}" for split in ("eval", "eval_train") for name in _EVAL}
    return evaluated | {f"train/{name}" for name in _TRAIN}
