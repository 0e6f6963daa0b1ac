"""What a run leaves on disk, and how many fit into memory, told beforehand."""

from precision_lab.training.size import disk_bytes, room_for, state_bytes
from tests.training.runs import config


def rows(**changes):
    """Returns for how many rows, of 200 bytes each, a run without checkpoints is counted."""
    one = config(**changes)
    return (disk_bytes(one) - (state_bytes(one) if one.train.steps else 0)) / 200


def test_evaluations_at_steps_of_their_own_and_under_further_policies_count_and_no_checkpoint_of_no_steps():
    # Steps 0, 10, 20, two rows each, and training rows at 5, 10, 15, 20.
    assert rows() == 3 * 2 + 4
    assert rows(train={"eval_at": [7, 10]}) == 4 * 2 + 4
    assert rows(evals={"half": "params=float16"}) == 3 * 3 + 4
    assert rows(train={"steps": 0}) == 2


def test_room_is_that_of_states_in_the_memory_available(monkeypatch):
    one = config(optim={"kind": "sgd", "lr": 0.1})
    parameters = 64 * 16 + 16 + 16 * 10 + 10
    monkeypatch.setattr("precision_lab.training.size.available_bytes", lambda: 10 * 4 * 4 * (parameters + 100))

    assert room_for(one) == 10
    monkeypatch.setattr("precision_lab.training.size.available_bytes", lambda: 100)
    assert room_for(one) == 1
