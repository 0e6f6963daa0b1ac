"""Which metrics a run logs, known before it runs, so that a claim about any other is refused at once."""

from precision_lab.training.config import RunConfig
from precision_lab.training.transforms import AUDITED, StoreConfig

_EVAL = ("loss", "accuracy", "nonfinite_fraction")
_TRAIN = ("loss", "grad_norm", "loss_scale", "skipped_steps", "zero_grad_fraction", "unchanged_fraction")


def metric_names(run: RunConfig) -> set[str]:
    """Returns the names, `split/metric`, of everything that the training of a run logs."""
    splits = ("eval", "eval_train", *(f"eval_{name}" for name in run.evals))
    evaluated = {f"{split}/{name}" for split in splits for name in _EVAL}
    if any(isinstance(one, StoreConfig) for one in run.transforms):
        evaluated |= {f"start/{name}" for name in AUDITED}
    return evaluated | ({f"train/{name}" for name in _TRAIN} if run.train.steps else set())
