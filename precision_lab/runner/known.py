"""Which metrics a run logs, known before it runs, so that a claim about any other is refused at once."""

from precision_lab.training import AnyRun, ProbeRun

_EVAL = ("loss", "accuracy")
_TRAIN = ("loss", "grad_norm", "loss_scale", "skipped_steps", "zero_grad_fraction", "unchanged_fraction")


def metric_names(run: AnyRun) -> set[str]:
    """Returns the names, `split/metric`, of everything that a run logs."""
    if isinstance(run, ProbeRun):
        return {f"probe/{name}" for name in run.probe.measures}
    evaluated = {f"{split}/{name}" for split in ("eval", "eval_train") for name in _EVAL}
    trained = {f"train/{name}" for name in _TRAIN}
    if run.optim.has_low_bit_second_moments:
        trained.add("train/zero_second_moment_fraction")
    return evaluated | trained
