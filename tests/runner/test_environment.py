import subprocess

from precision_lab.runner import environment


def test_the_fingerprint_names_what_can_change_a_number():
    found = environment.fingerprint()

    assert {"python", "jax", "jaxlib", "numpy", "backend", "device", "cores", "xla_flags", "x64", "prng"} <= set(found)
    assert found["cores"] >= 1
    assert found["backend"] in {"cpu", "gpu", "tpu"}


def test_a_difference_is_said_in_words():
    stored = {"jax": "0.10.2", "cores": 2, "xla_flags": "", "commit": "0" * 40}
    current = {"jax": "0.12.0", "cores": 2, "xla_flags": "--xla_x", "commit": "1" * 40}

    assert environment.differences(stored, current) == [
        "jax 0.10.2, here 0.12.0",
        "xla_flags none, here --xla_x",
        "commit 000000000000, here 111111111111",
    ]
    assert environment.differences(current, current) == []


def test_git_that_is_missing_or_fails_is_no_error(monkeypatch, tmp_path):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    assert environment._git(tmp_path, "rev-parse", "HEAD") is None
    monkeypatch.setattr(subprocess, "run", no_git)
    assert environment._git(tmp_path, "rev-parse", "HEAD") is None
