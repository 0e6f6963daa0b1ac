"""Checkpoints: committed or absent, of this run or refused, and quiet."""

import logging
import math
from typing import Annotated

import jax
import numpy as np
import pytest
from pydantic import Field

from precision_lab.data import DigitsConfig
from precision_lab.models.fields import FrozenConfig
from precision_lab.runner.identity import semantic
from precision_lab.training.checkpointing import Checkpoints, _not_semantic
from precision_lab.training.numbers import hyper
from precision_lab.training.program import program_for
from tests.training.runs import config, run


@pytest.fixture(scope="module")
def program():
    return program_for(config(), DigitsConfig().spec())


@pytest.fixture
def state(program):
    return program.init(0, hyper(config()))


def test_a_state_comes_back_bit_for_bit_and_metrics_too(tmp_path, program, state):
    metrics = {"eval/loss": 0.1 + 0.2, "train/loss": math.inf, "train/skipped_steps": 3.0, "bad": math.nan}
    with Checkpoints(tmp_path, config()) as checkpoints:
        checkpoints.save(4, state, metrics)
    with Checkpoints(tmp_path, config()) as checkpoints:
        restored = checkpoints.restore(program.state_shapes)

    assert restored is not None
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert repr(restored.metrics) == repr(metrics)


def test_the_latest_of_two_kept_checkpoints_is_restored(tmp_path, program, state):
    with Checkpoints(tmp_path, config()) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"x": float(step)})
        restored = checkpoints.restore(program.state_shapes)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert restored is not None
    assert restored.metrics == {"x": 3.0}


def test_an_interrupted_save_is_not_loaded(tmp_path, program, state):
    with Checkpoints(tmp_path, config()) as checkpoints:
        checkpoints.save(1, state, {"x": 1.0})
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "record").write_text("{")

    with Checkpoints(tmp_path, config()) as checkpoints:
        restored = checkpoints.restore(program.state_shapes)
        checkpoints.save(2, state, {"x": 2.0})
        again = checkpoints.restore(program.state_shapes)

    assert restored is not None
    assert again is not None
    assert (restored.metrics, again.metrics) == ({"x": 1.0}, {"x": 2.0})


def test_nothing_saved_restores_nothing(tmp_path, program):
    with Checkpoints(tmp_path, config()) as checkpoints:
        assert checkpoints.restore(program.state_shapes) is None
    with Checkpoints(None, config()) as nowhere:
        assert nowhere.restore(program.state_shapes) is None


def test_checkpoints_of_another_run_are_refused_and_left_alone(tmp_path):
    run(folder=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(ValueError, match=r"belong to a run with another config: model, seed differ"):
        run(folder=tmp_path, seed=1, model={"kind": "mlp", "hidden": [32]})

    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_saving_logs_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(folder=tmp_path)

    assert [record for record in caplog.records if record.levelno >= logging.INFO and record.name == "absl"] == []


def test_how_often_to_save_may_change_between_two_calls(tmp_path):
    result, _ = run(folder=tmp_path, train={"checkpoint_every": 7})

    again, _ = run(folder=tmp_path, train={"checkpoint_every": 5})

    assert again == result


def test_loggers_have_their_levels_back_when_the_last_of_several_runs_has_ended(tmp_path):
    """Contexts of runs in threads overlap as they please: here the first to open is the first to close."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.level for logger in loggers]
    first, second = Checkpoints(tmp_path / "0", config()), Checkpoints(tmp_path / "1", config())

    first.__enter__()
    second.__enter__()
    first.__exit__(None)
    between = [logger.level for logger in loggers]
    second.__exit__(None)

    assert between == [logging.CRITICAL] * 2
    assert [logger.level for logger in loggers] == before


class _Part(FrozenConfig):
    """A part of a config, with an option that came later and one that does not tell runs apart."""

    size: int = 1
    added: Annotated[int, Field(json_schema_extra={"legacy": 0})] = 0
    shown: Annotated[str, Field(json_schema_extra={"semantic": False})] = ""


class _Whole(FrozenConfig):
    parts: tuple[_Part, ...] = ()
    named: dict[str, _Part] = {}  # noqa: RUF012 (pydantic copies it)


def test_what_tells_runs_apart_within_tuples_and_mappings_is_what_their_names_are_made_of():
    parts = _Part(size=2, shown="x"), _Part(added=3)

    whole = _Whole(parts=parts, named={"a": parts[0], "b": parts[1]})

    assert whole.model_dump(mode="json", exclude=_not_semantic(whole)) == semantic(whole)
    assert semantic(whole)["parts"] == [{"size": 2}, {"size": 1, "added": 3}]
