"""The run config: everything that decides the numbers of one training run, as data. JAX is not imported here.

    RunConfig.model_validate({
        "model": {"kind": "mlp", "hidden": [128, 128]},
        "data": {"kind": "digits", "batch": 64},
        "optim": {"kind": "adam", "lr": 1e-3},
        "policy": "params=float16,compute=float16,output=float32",
        "master_weights": True,
        "loss_scale": {"kind": "dynamic"},
        "train": {"steps": 500},
    })

Two configs that are equal train to the same numbers. What changes no number and no row, such as how often to save, is
marked `{"semantic": False}`: runs that differ in nothing else are the same run.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from precision_lab.data.config import AnyData
from precision_lab.models.config import AnyModel
from precision_lab.models.fields import (
    Bool,
    Float,
    Fraction,
    FrozenConfig,
    Int,
    NotNegative,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    located_error,
    tuple_of_list,
)
from precision_lab.models.registry import Registry
from precision_lab.policy import Policy
from precision_lab.quant import Quantizer, quantizer
from precision_lab.training.mesh import MeshConfig
from precision_lab.training.qat import QATConfig, check_qat
from precision_lab.training.start import (
    LoRAConfig,
    NamedPolicies,
    Policies,
    StartConfig,
    canonical_policy,
    why_no_start,
)
from precision_lab.training.transforms import AnyTransform

_STORABLE = ("float32", "bfloat16", "float16")

Scale = Annotated[Float, Field(ge=2.0**-126, le=2.0**126)]
"""A loss scale: normal in float32, and its reciprocal too."""


class _Tagged(FrozenConfig):
    """Base of the small unions below."""

    kind: str


class ScheduleConfig(_Tagged):
    """Base of the learning-rate schedules; each gives a factor on `lr`."""


class ConstantSchedule(ScheduleConfig):
    """Factor 1 at every step."""

    kind: Literal["constant"] = "constant"


class CosineSchedule(ScheduleConfig):
    """Half a cosine from 1 at the first step to `end` at the last (Loshchilov and Hutter, arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    end: Fraction = 0.0


class WarmupCosineSchedule(ScheduleConfig):
    """A line from 0 to 1 over `warmup` steps, then half a cosine to `end` at the last step."""

    kind: Literal["warmup_cosine"] = "warmup_cosine"
    warmup: PositiveInt
    end: Fraction = 0.0


class OptimConfig(_Tagged):
    """Base of the optimizers.

    Attributes:
      lr: peak learning rate.
      clip_norm: clips the unscaled gradient's global norm in float32; None does not.
      schedule: factor on `lr`.
      state: quantizer that moments of 4096 values or more are stored by, such as "dynamic8@group2048"; None keeps them
        in float32. See `optim.low_bit_state`.
    """

    lr: PositiveFloat
    clip_norm: PositiveFloat | None = None
    schedule: "AnySchedule" = ConstantSchedule()
    state: Annotated[str | None, Field(json_schema_extra={"legacy": None})] = None

    @field_validator("state", mode="before")
    @classmethod
    def _canonical_state(cls, value: Any) -> str | None:
        if value is not None and not isinstance(value, str | Quantizer):
            raise ValueError(f"expected a quantizer such as dynamic8@group2048, got {value!r}")
        return None if value is None else str(quantizer(value))

    @property
    def has_low_bit_second_moments(self) -> bool:
        """Whether squares of gradients are stored in few bits, so that it is worth counting how many became zero."""
        return self.state is not None and "b2" in type(self).model_fields


class SGDConfig(OptimConfig):
    """Gradient descent with momentum; `weight_decay` is added to the gradient, as in the original."""

    kind: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.0
    nesterov: Bool = False
    weight_decay: NotNegative = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGDConfig":
        if self.nesterov and self.momentum == 0:
            message = "nesterov needs momentum: set momentum (such as 0.9) or drop nesterov"
            raise located_error(("nesterov",), message, self.nesterov)
        return self

    @model_validator(mode="after")
    def _state_needs_momentum(self) -> "SGDConfig":
        if self.state is not None and self.momentum == 0:
            message = "sgd without momentum has no state to quantize: set momentum (such as 0.9) or drop state"
            raise located_error(("state",), message, self.state)
        return self


class AdamConfig(OptimConfig):
    """Adam (Kingma and Ba, arXiv:1412.6980)."""

    kind: Literal["adam"] = "adam"
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PositiveFloat = 1e-8


class AdamWConfig(OptimConfig):
    """Adam with weight decay apart from the gradient (Loshchilov and Hutter, arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NotNegative = 1e-2


class LossScaleConfig(_Tagged):
    """Base of the loss scales; see `precision_lab.optim.loss_scaling`."""


class NoLossScaleConfig(LossScaleConfig):
    """The loss is not scaled, and every step is applied."""

    kind: Literal["none"] = "none"


class StaticLossScaleConfig(LossScaleConfig):
    """The loss is multiplied by `scale`; a step with a non-finite gradient is skipped."""

    kind: Literal["static"] = "static"
    scale: Scale


class DynamicLossScaleConfig(LossScaleConfig):
    """The scale doubles after `interval` finite steps and halves after one that is not, which is skipped."""

    kind: Literal["dynamic"] = "dynamic"
    init: Scale = 65536.0
    growth: Annotated[Float, Field(gt=1)] = 2.0
    backoff: Annotated[Float, Field(gt=0, lt=1)] = 0.5
    interval: PositiveInt = 2000
    min: Scale = 1.0
    max: Scale = 2.0**24

    @model_validator(mode="after")
    def _ordered(self) -> "DynamicLossScaleConfig":
        if not self.min <= self.init <= self.max:
            message = f"expected min <= init <= max: min is {self.min:g}, init {self.init:g}, max {self.max:g}"
            raise located_error(("init",), message, self.init)
        return self


def _registry(noun: str, base: type, *classes: type) -> Registry:
    """Returns a registry of config classes that nothing has to build by kind."""
    registry: Registry = Registry(noun, base)
    for cls in classes:
        registry.register(cls.model_fields["kind"].default, cls, "")  # type: ignore[attr-defined]
    return registry


_SCHEDULES = _registry("schedule", ScheduleConfig, ConstantSchedule, CosineSchedule, WarmupCosineSchedule)
_LOSS_SCALES = _registry(
    "loss scale", LossScaleConfig, NoLossScaleConfig, StaticLossScaleConfig, DynamicLossScaleConfig
)
AnySchedule = Annotated[ConstantSchedule | CosineSchedule | WarmupCosineSchedule, BeforeValidator(_SCHEDULES.validate)]
AnyLossScale = Annotated[
    NoLossScaleConfig | StaticLossScaleConfig | DynamicLossScaleConfig, BeforeValidator(_LOSS_SCALES.validate)
]
for _cls in (OptimConfig, SGDConfig, AdamConfig, AdamWConfig):
    _cls.model_rebuild()
_OPTIMIZERS = _registry("optimizer", OptimConfig, SGDConfig, AdamConfig, AdamWConfig)
AnyOptim = Annotated[SGDConfig | AdamConfig | AdamWConfig, BeforeValidator(_OPTIMIZERS.validate)]


class TrainConfig(FrozenConfig):
    """How long to train and how often to look.

    Attributes:
      steps: number of optimizer updates, skipped ones included; 0 evaluates what the run begins from.
      eval_every: steps between evaluations; None evaluates before the first step and after the last only.
      eval_at: further steps to evaluate at.
      log_every: steps between rows of training metrics.
      checkpoint_every: steps between checkpoints; None saves at the end only. No part of a run's identity.
      eval_examples: how many examples of each split an evaluation uses, the first ones; None uses all.
      loss_shift: k multiplies the loss by 2**-k and the learning rate by 2**k. In float32 nothing changes, bit for
        bit; in a narrow format the gradients move k binades towards underflow. At most 32 either way: gradients
        below 2**(k - 126) become subnormal in float32 itself, where they lose digits or are flushed to zero.
      on_nonfinite: "stop" ends the run as diverged once a step with a non-finite loss was applied; "skip" applies
        no step with a non-finite loss or gradient, with a loss scale or without one, and counts it; "continue" goes
        on, and the result says which step was the first (`first_nonfinite`).
    """

    steps: NotNegativeInt
    eval_every: PositiveInt | None = None
    eval_at: Annotated[
        tuple[NotNegativeInt, ...], BeforeValidator(tuple_of_list), Field(json_schema_extra={"legacy": []})
    ] = ()
    log_every: PositiveInt = 50
    checkpoint_every: Annotated[PositiveInt | None, Field(json_schema_extra={"semantic": False})] = None
    eval_examples: PositiveInt | None = 10_000
    loss_shift: Annotated[Int, Field(ge=-32, le=32)] = 0
    on_nonfinite: Literal["stop", "skip", "continue"] = "stop"

    @model_validator(mode="after")
    def _within_the_run(self) -> "TrainConfig":
        if self.eval_at and max(self.eval_at) > self.steps:
            message = f"eval_at asks for step {max(self.eval_at)}, the run has {self.steps}: leave out what is past it"
            raise located_error(("eval_at",), message, self.eval_at)
        return self


class RunConfig(FrozenConfig):
    """One training run.

    Attributes:
      model, data, optim, train: see their classes.
      policy: number formats of the run, in `Policy`'s canonical string.
      master_weights: keep a float32 master of every parameter that the policy stores in 16 bits. Without it such
        parameters are updated in place, as `update` says; the optimizer's own state is float32 either way.
      update: how 16-bit parameters without a master are updated: "nearest" rounds the sum of parameter and step to
        nearest, "stochastic" at random, "kahan" keeps what is lost in a second 16-bit number.
      loss_scale: see `precision_lab.optim.loss_scaling`.
      seed: decides the initialisation and the order of the data, whatever the policy.
      start: the run whose final parameters this one begins from; None initialises the model.
      evals: further policies, by name, that the same parameters are evaluated under whenever the run is: a training
        run with quantized weights may have `shadow: float32`, a float32 run `int4: "weight=int4@channel"`.
      transforms: what is done to the parameters that it begins with, in this order.
      lora: trains adapters beside the weights instead of the parameters; None trains the parameters.
      qat: when quantizers that learn ("lsq", "pact") or follow running ranges ("ema") start and stop; see `QATConfig`.
        None, for a policy that has such ones, starts them with the run and never stops them.
      mesh: the devices that train it, one by default; how sums are divided may move the last bits of its numbers.
    """

    model: AnyModel
    data: AnyData
    optim: AnyOptim
    train: TrainConfig
    policy: str = "float32"
    master_weights: Bool = False
    update: Annotated[Literal["nearest", "stochastic", "kahan"], Field(json_schema_extra={"legacy": "nearest"})] = (
        "nearest"
    )
    loss_scale: AnyLossScale = NoLossScaleConfig()
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    start: Annotated[StartConfig | None, Field(json_schema_extra={"legacy": None})] = None
    evals: Annotated[NamedPolicies, Field(json_schema_extra={"legacy": {}})] = Policies()
    transforms: Annotated[
        tuple[AnyTransform, ...], BeforeValidator(tuple_of_list), Field(json_schema_extra={"legacy": []})
    ] = ()
    lora: Annotated[LoRAConfig | None, Field(json_schema_extra={"legacy": None})] = None
    qat: Annotated[QATConfig | None, Field(json_schema_extra={"legacy": None})] = None
    mesh: Annotated[MeshConfig, Field(json_schema_extra={"legacy": {"data": 1, "fsdp": 1, "tensor": 1}})] = MeshConfig()

    @field_validator("policy", mode="before")
    @classmethod
    def _canonical_policy(cls, value: Any) -> str:
        return canonical_policy(value)

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        _check_task(self)
        _check_storage(self)
        _check_lora(self)
        check_qat(self)
        _check_start(self)
        _check_loss_shift(self)
        schedule = self.optim.schedule
        if isinstance(schedule, WarmupCosineSchedule) and schedule.warmup >= self.train.steps > 0:
            message = f"warmup is {schedule.warmup}, train.steps only {self.train.steps}: use fewer steps of warm-up"
            raise located_error(("optim", "schedule", "warmup"), message, schedule.warmup)
        return self

    @property
    def total_steps(self) -> int:
        """How many steps progress is counted in."""
        return self.train.steps


def _check_task(run: RunConfig) -> None:
    """Raises if the model cannot learn the data."""
    spec = run.data.spec()
    if spec is None:
        return
    try:
        run.model.check(spec)
    except ValueError as error:
        raise located_error(("model", "kind"), str(error), run.model.kind) from error


def _check_storage(run: RunConfig) -> None:
    """Raises for parameters that optax cannot update, and for masters that would be copies."""
    params = Policy.parse(run.policy).params.name
    if params not in _STORABLE:
        message = f"the policy stores parameters as {params}; training can store {', '.join(_STORABLE)}"
        raise located_error(("policy",), message, run.policy)
    if run.master_weights and params == "float32":
        message = (
            f"master_weights needs 16-bit parameters, but policy '{run.policy}' stores float32. "
            "Drop master_weights, or store 16 bits: params=float16"
        )
        raise located_error(("master_weights",), message, True)
    if run.update != "nearest" and (run.master_weights or params == "float32"):
        why = (
            "master_weights updates float32 masters" if run.master_weights else f"policy '{run.policy}' stores float32"
        )
        message = (
            f"update: {run.update} is for 16-bit parameters without a master, but {why}. Drop update, or store 16 bits "
            "without master_weights: params=bfloat16"
        )
        raise located_error(("update",), message, run.update)


def _check_lora(run: RunConfig) -> None:
    """Raises for adapters beside weights that are stored in less than float32."""
    for keys, policy in [(("policy",), run.policy), *((("evals", name), one) for name, one in run.evals.items())]:
        params = Policy.parse(policy).params.name
        if run.lora is not None and params != "float32":
            message = (
                f"lora trains float32 adapters, but policy '{policy}' stores parameters as {params}: store float32, "
                "and say what the weights are multiplied in: compute=bfloat16, weight=nf4"
            )
            raise located_error(keys, message, policy)


def _check_start(run: RunConfig) -> None:
    """Raises if the final parameters of the run that this one begins from are not what it begins with."""
    parent = None if run.start is None else run.start.run
    why = None if parent is None else why_no_start(run, parent, "the run that it starts from")
    if why is not None:
        field, message = why
        raise located_error(("start", "run" if field == "arm" else field), message, field)


def _check_loss_shift(run: RunConfig) -> None:
    """Raises where `loss_shift` would change a float32 run."""
    if run.train.loss_shift == 0:
        return
    if run.optim.kind != "sgd":
        message = (
            f"loss_shift needs optim.kind sgd, got {run.optim.kind}: Adam's step does not scale with the gradient, "
            "so the shift would not be undone"
        )
        raise located_error(("train", "loss_shift"), message, run.train.loss_shift)
    if run.optim.clip_norm is not None:
        message = "loss_shift and optim.clip_norm exclude each other: the norm of shifted gradients may underflow"
        raise located_error(("train", "loss_shift"), message, run.train.loss_shift)


StartConfig.model_rebuild()
RunConfig.model_rebuild()
