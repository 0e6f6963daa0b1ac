"""Check 51 of quantization: one seed, one report, byte for byte; another changes what is drawn and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import precision_lab as pl
from precision_lab.nn import add_lora, storage

IMAGES = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
STATIC = "weight=int4@group8,activation=int8@tensor,mse"


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(7)
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def report(seed):
    """Returns what a study of a model says, in bytes: the parts that a seed decides, and the others."""
    model, key = Net(), jax.random.key(seed)
    kernel, x = model.up.kernel[...], jnp.asarray(IMAGES)
    drawn = jnp.asarray(IMAGES[np.random.default_rng(seed).permutation(64)[:8]])
    scores = pl.sensitivity(model, ["weight=int4@channel", "weight=int2@channel"], [x])
    calibrated, stored = pl.calibrate(model, STATIC, [drawn]), pl.convert(model, "weight=nf4@group8,double", x)
    tuned = add_lora(model, x, rank=2, key=key)
    decided = {
        "stochastic rounding": pl.quantize(kernel, "int4@channel,stochastic", axis=0, key=key),
        "adapters": nnx.to_pure_dict(nnx.state(tuned, nnx.LoRAParam)),
        "calibration": (str(calibrated), pl.convert(calibrated)(x)),
    }
    others = {
        "rounding": pl.quantize(kernel, "int4@channel,mse", axis=0),
        "sensitivity": (str(scores), str(scores.to_dicts())),
        "allocation": str(pl.allocate(scores, 6)),
        "stored": (str(storage(stored)), nnx.to_pure_dict(nnx.state(stored)), stored(x)),
        "adapted": tuned(x),  # B is zero at first
    }
    return tuple({name: in_bytes(part) for name, part in parts.items()} for parts in (decided, others))


def in_bytes(tree):
    return b"".join(x.encode() if isinstance(x, str) else np.asarray(x).tobytes() for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_one_seed_is_one_report_and_another_changes_what_is_drawn_alone():
    (drawn, same), again, (other_drawn, other_same) = report(3), report(3), report(4)

    assert (drawn, same) == again
    assert other_same == same
    assert [name for name, part in drawn.items() if other_drawn[name] == part] == []
