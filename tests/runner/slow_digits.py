"""Data sets for tests that stop runs: the digits, as slowly as `SLEEP_S` says, so that there is time to stop them, and
digits that end the process where `DIE` is set.
"""

import os
import sys
import time
from typing import Literal

from precision_lab.data import DataConfig, Dataset, DigitsConfig, load, register_data
from precision_lab.models import DataSpec


class SlowDigitsConfig(DataConfig):
    kind: Literal["slow_digits"] = "slow_digits"

    def spec(self) -> DataSpec:
        return DigitsConfig().spec()


class SlowSplit:
    """A split that takes its time."""

    def __init__(self, split) -> None:
        self.split = split

    def __len__(self):
        return len(self.split)

    def take(self, indices):
        time.sleep(float(os.environ.get("SLEEP_S", "0")))
        return self.split.take(indices)


def load_slowly(config) -> Dataset:
    digits = load(DigitsConfig())
    return Dataset(digits.spec, SlowSplit(digits.train), digits.eval, digits.eval_train)


class DeadlyDigitsConfig(SlowDigitsConfig):
    kind: Literal["deadly_digits"] = "deadly_digits"


class DeadlySplit(SlowSplit):
    """A split that takes the whole process down, once its time has come."""

    def take(self, indices):
        if "DIE" in os.environ and indices[0] == 0:
            print("the last words", file=sys.stderr, flush=True)
            os._exit(9)
        return super().take(indices)


def load_deadly(config) -> Dataset:
    digits = load(DigitsConfig())
    return Dataset(digits.spec, DeadlySplit(digits.train), DeadlySplit(digits.eval), digits.eval_train)


register_data("deadly_digits", DeadlyDigitsConfig, load_deadly)
register_data("slow_digits", SlowDigitsConfig, load_slowly)
