"""Fixtures of the doctor's tests."""

import pytest

from exporter.checkpoint.pair import Pair, open_pair
from exporter.doctor import diagnosis
from tests.exporter.doctor.engines import Pairs


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sampled text: enough to compare values, too few to judge acceptance."""
    monkeypatch.setattr(diagnosis, "SAMPLED_TEXTS", 1)


@pytest.fixture(scope="session")
def odd(pair_dirs: Pairs) -> Pair:
    """The pair of shape `odd`, the quickest to trace."""
    return open_pair(*pair_dirs("odd"))
