import pytest

from tests.runner.fakes import FakeTraining, install


@pytest.fixture
def training(monkeypatch, tmp_path):
    """Training that takes no time, and an empty working directory."""
    fake = FakeTraining()
    install(monkeypatch, fake)
    monkeypatch.chdir(tmp_path)
    return fake
