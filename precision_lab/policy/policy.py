"""`Policy`: the number format of every tensor of a computation, with rules by site.

A policy is data: frozen, hashable, equal when it means the same, and printed as the string it parses from. What it
does to a computation is the business of `precision_lab.rewrite`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from precision_lab.formats import Format
from precision_lab.policy.casting import cast_floating
from precision_lab.policy.checks import Origins, check_at, check_treatment, check_whole
from precision_lab.policy.patterns import glob_matches
from precision_lab.policy.treatment import (
    FLOAT32,
    SETTINGS,
    Treatment,
    default_accum,
    require_sign_and_zero,
)

if TYPE_CHECKING:
    import jmp

Tree = TypeVar("Tree")

OPS = ("products", "autocast")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What differs at the sites that `pattern` matches.

    Attributes:
      pattern: glob over a site's path or full name. `*` stays within one path component, `**` spans any number:
        `**/head/**` matches `head/kernel` and `decoder/head/kernel`; `**:conv_general_dilated*` matches by operation;
        `@LayerNorm` matches what runs inside modules of that class.
      settings: (key, value) pairs, keys of `SETTINGS`; what is not there stays as the policy has it.
    """

    pattern: str
    settings: tuple[tuple[str, Any], ...]

    def matches(self, *names: str) -> bool:
        """Returns whether the pattern matches any of a site's names."""
        return any(glob_matches(self.pattern, name) for name in names)

    def sets(self, *keys: str) -> bool:
        """Returns whether the rule says anything about one of these settings."""
        return any(key in keys for key, _ in self.settings)

    def quantizes(self, *keys: str) -> bool:
        """Returns whether the rule gives a quantizer to one of these settings."""
        return any(key in keys and value is not None for key, value in self.settings)

    def __str__(self) -> str:
        return f"{self.pattern}:" + ",".join(f"{key}={SETTINGS[key].show(value)}" for key, value in self.settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(Treatment):
    """The number format of every tensor of a computation.

    The settings of `Treatment` say what happens at every site that no rule excepts. Beside these:

    Attributes:
      params: how parameters are stored.
      output: floating outputs of the function or model.
      ops: what becomes of operations that are not products. "products" leaves them as the model's author wrote them.
        "autocast" lets the results of products stay in `compute` and treats every other operation by the table
        `precision_lab.policy.OP_TABLE`, as torch.amp does: exponentials, reductions and losses in float32, additions
        in the wider type, layout in the type they find.
      rules: exceptions by site; where several match, the last one wins, setting by setting.

    Source: the three-dtype policy and its strings follow jmp (google-deepmind/jmp, `jmp.get_policy`): what is not
      given follows its left neighbour in params -> compute -> output (unless compute is narrower than 16 bits or
      simulated: then outputs follow params). `half` is float16 here on every device,
      while jmp's depends on the device that parses it.
    """

    params: Format = FLOAT32
    output: Format = FLOAT32
    ops: str = "products"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if self.ops not in OPS:
            raise ValueError(f"ops={self.ops} must be one of {', '.join(OPS)}.")
        check_treatment(self)
        check_whole(self)
        for key in ("params", "output"):
            _require_storable(key, getattr(self, key))
        for rule in self.rules:
            check = check_treatment if rule.sets("outliers") else check_at  # what it is for, other rules may give
            check(_changed(self._treatment(), rule), Origins((rule,)))

    @classmethod
    def parse(cls, spec: str | Policy | jmp.Policy | Any) -> Policy:
        """Returns the policy that `spec` describes.

        Args:
          spec: a Policy; a jmp.Policy; a preset's name; a string such as
            `"params=float32,compute=bfloat16,output=float32"` (any jmp string, also `p=f32,c=bf16,o=f32`) with any
            keys of `Policy` and `Treatment`, followed by rules as in `";**/head/**:compute=float32"`; or one format,
            name or dtype, for params, compute and output. Settings may follow a preset: `"w8a8,attention=int8@token"`.

        Raises:
          ValueError: an unknown or repeated key, an unknown format, or a setting that cannot be honoured.
        """
        from precision_lab.policy.parsing import parse_policy

        return parse_policy(spec)

    @classmethod
    def preset(cls, name: str) -> Policy:
        """Returns the preset called `name`; `precision_lab.policy.PRESETS` lists them with their sources."""
        from precision_lab.policy.presets import preset

        return preset(name)

    def with_rule(self, pattern: str, **settings: Any) -> Policy:
        """Returns this policy with one more rule, which overrides the earlier ones where it matches.

        Args:
          pattern: glob over site paths, see `Rule`. A rule that matches no site, or sets what acts on none that it
            matches, is an error when the policy is applied, because only then the sites are known. Of several
            quantizers of operands (weight, activation, attention, embedding) one has to act.
          settings: settings of `Treatment`, each as its value or what parses to it, such as `compute="float32"`,
            `weight="int4@group32"`, `weight=None`.

        Raises:
          ValueError: the rule sets nothing, something that does not exist, or what operations cannot have.
        """
        if unknown := [key for key in settings if key not in SETTINGS]:
            raise ValueError(
                f"rule '{pattern}': unknown setting '{unknown[0]}'; the settings are {', '.join(SETTINGS)}."
            )
        if not settings:
            raise ValueError(f"rule '{pattern}' sets nothing; give compute=, weight=, accum= or another setting.")
        if not pattern or any(char in pattern for char in ";,= "):
            raise ValueError(f"rule pattern '{pattern}' must be non-empty, without spaces and any of , ; =")
        ordered = tuple((key, SETTINGS[key].read(settings[key])) for key in SETTINGS if key in settings)
        return dataclasses.replace(self, rules=(*self.rules, Rule(pattern, ordered)))

    def at(self, *names: str) -> Treatment:
        """Returns what happens at the site that goes by `names`, rules applied in order."""
        treatment = self._treatment()
        for rule in self.rules:
            if rule.matches(*names):
                treatment = _changed(treatment, rule)
        return treatment

    def check_at(self, treatment: Treatment, names: Sequence[str]) -> None:
        """Raises ValueError if rules gave the product that goes by `names` a treatment that contradicts itself."""
        check_at(treatment, Origins([rule for rule in self.rules if rule.matches(*names)], names[0]))

    def decided_by(self, setting: str, names: Sequence[str]) -> str:
        """Returns the pattern of the rule that decides a setting at the site that goes by `names`, empty if none."""
        found = [rule.pattern for rule in self.rules if rule.sets(setting) and rule.matches(*names)]
        return found[-1] if found else ""

    def _treatment(self) -> Treatment:
        """Returns what happens where no rule matches."""
        return Treatment(**{key: getattr(self, key) for key in SETTINGS})

    @property
    def reaches_operations(self) -> bool:
        """Whether anything but products may be changed."""
        return (
            self.ops == "autocast"
            or self.round is not None
            or self.op is not None
            or any(rule.sets("op", "round") for rule in self.rules)
        )

    def cast_to_param(self, tree: Tree) -> Tree:
        """Returns `tree` with its floating arrays in the params dtype; see `cast_floating` for what stays."""
        return cast_floating(tree, self.params.dtype)

    def cast_to_compute(self, tree: Tree) -> Tree:
        """Returns `tree` with its floating arrays in the compute dtype, as jmp does at entry.

        `apply_policy` never does this: casting at entry accumulates the gradient of a weight that is used many times
        in the low precision. This is for code that threads dtypes by hand.
        """
        _require_storable("compute", self.compute)
        return cast_floating(tree, self.compute.dtype)

    def cast_to_output(self, tree: Tree) -> Tree:
        """Returns `tree` with its floating arrays in the output dtype; see `cast_floating` for what stays."""
        return cast_floating(tree, self.output.dtype)

    def kwargs(self, path: str = "") -> dict[str, Any]:
        """Returns what a layer's constructor takes under this policy, for those who thread dtypes by hand.

        `nnx.Linear(8, 8, **policy.kwargs("head/kernel"), rngs=rngs)`, `linen.Dense(8, **policy.kwargs("head/kernel"))`.
        Flax then casts the operands, accumulates as its layers do, and leaves the backward products to JAX.

        Args:
          path: a site, for its rules; empty for none.

        Returns:
          `dtype`, the compute format's, and `param_dtype`, the params format's.

        Raises:
          ValueError: the compute format there has no dtype that arrays can have.
        """
        compute = self.at(path).compute if path else self.compute
        _require_storable("compute", compute)
        return {"dtype": compute.dtype, "param_dtype": self.params.dtype}

    def to_jmp(self) -> jmp.Policy:
        """Returns the jmp policy of the same three dtypes.

        Raises:
          ValueError: the policy says more than jmp can hold (rules, quantizers, another accumulator, a simulated
            format).
        """
        import jmp

        accum = default_accum(self.compute)
        if self != Policy(params=self.params, compute=self.compute, output=self.output, accum=accum):
            raise ValueError(f"jmp has no rules, no accumulator and no quantizers; this policy has: '{self}'.")
        _require_storable("compute", self.compute)
        return jmp.Policy(self.params.dtype, self.compute.dtype, self.output.dtype)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        parts = [f"params={self.params.name}", f"compute={self.compute.name}", f"output={self.output.name}"]
        default = Treatment(compute=self.compute, accum=default_accum(self.compute))
        for key, setting in SETTINGS.items():
            if getattr(self, key) != getattr(default, key):
                parts.append(f"{key}={setting.show(getattr(self, key))}")
        if self.ops != "products":
            parts.append(f"ops={self.ops}")
        return ";".join([",".join(parts), *map(str, self.rules)])

    def __repr__(self) -> str:
        return f"Policy.parse('{self}')"


def _changed(treatment: Treatment, rule: Rule) -> Treatment:
    """Returns a treatment with a rule's settings; an accumulator that came with `compute` goes with it."""
    settings = dict(rule.settings)
    if "compute" in settings and "accum" not in settings and treatment.accum == default_accum(treatment.compute):
        settings["accum"] = default_accum(settings["compute"])
    return dataclasses.replace(treatment, **settings)


def _require_storable(key: str, fmt: Format) -> None:
    """Raises unless arrays of `fmt` exist as a floating dtype."""
    require_sign_and_zero(key, fmt)
    if fmt.kind != "float" or fmt.dtype is None:
        reason = "it has no array dtype" if fmt.dtype is None else "integers need a scale, which no cast has"
        raise ValueError(
            f"{key}={fmt.name} cannot store floating tensors: {reason}. Choose float32, bfloat16, float16..."
        )
