"""Which metrics a run logs, and when, known before it runs, so that a claim about any other is refused at once."""

from precision_lab.training import AnyRun, ProbeRun
from precision_lab.training.qat import weights_have_error
from precision_lab.training.rows import evaluates_at, logs_at
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
    names |= {f"{split}/relative_mse" for split, policy in policies.items() if weights_have_error(policy)}
    if any(isinstance(one, StoreConfig) for one in run.transforms):
        names |= {f"start/{name}" for name in AUDITED}
    if run.train.steps:
        names |= {f"train/{name}" for name in _TRAIN}
    if run.train.steps and run.optim.has_low_bit_second_moments:
        names.add("train/zero_second_moment_fraction")
    return names


def is_logged_at(run: AnyRun, metric: str, step: int) -> bool:
    """Returns whether a run logs a metric, which is one of its own, after so many steps."""
    split = metric.partition("/")[0]
    if isinstance(run, ProbeRun):
        return step == 1
    if split == "start":
        return step == 0
    return logs_at(run.train, step) if split == "train" else evaluates_at(run.train, step)


def why_not_at(run: AnyRun, metric: str, step: int) -> str:
    """Returns in words that a run does not log a metric at a step, when it does, and what would add the step."""
    if isinstance(run, ProbeRun) or metric.startswith("start/"):
        return f"{metric} is logged once, at step {int(isinstance(run, ProbeRun))}, not at {step}"
    if step > run.train.steps:
        return f"{metric} has no step {step}: the run ends at {run.train.steps}; --set claims=[] leaves claims out"
    near = [next((at for at in steps if is_logged_at(run, metric, at)), None)
            for steps in (range(step, -1, -1), range(step, run.train.steps + 1))]  # fmt: skip
    way = "train.log_every sets them" if metric.startswith("train/") else f"train.eval_at: [{step}] adds it"
    words = " and ".join(str(at) for at in near if at is not None)
    return f"{metric} is not logged at step {step}, but at {words}; {way}"
