"""Which metrics a run logs, known before it runs, so that a claim about any other is refused at once."""

from precision_lab.training import AnyRun, ProbeRun
from precision_lab.training.start import quantizes_parameters
from precision_lab.training.transforms import AUDITED, StoreConfig

_EVAL = ("loss", "accuracy", "nonfinite_fraction")
_TRAIN = ("loss", "grad_norm", "loss_scale", "skipped_steps", "zero_grad_fraction", "unchanged_fraction")


def metric_names(run: AnyRun) -> set[str]:
    """Returns the names, `split/metric`, of everything that a run logs."""
    if isinstance(run, ProbeRun):
        return {f"probe/{name}" for name in run.probe.measures}
    splits = ("eval", "eval_train", *(f"eval_{name}" for name in run.evals))
    names = {f"{split}/{name}" for split in splits for name in _EVAL}
    names |= {f"eval_{name}/excess" for name in run.evals}
    policies = {"weights": run.policy, **{f"weights_{name}": policy for name, policy in run.evals.items()}}
    names |= {f"{split}/relative_mse" for split, policy in policies.items() if quantizes_parameters(policy)}
    if any(isinstance(one, StoreConfig) for one in run.transforms):
        names |= {f"start/{name}" for name in AUDITED}
    if run.train.steps:
        names |= {f"train/{name}" for name in _TRAIN}
    if run.train.steps and run.optim.has_low_bit_second_moments:
        names.add("train/zero_second_moment_fraction")
    return names
