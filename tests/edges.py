"""Strategies of hypothesis that spoil JSON documents: values of other kinds, missing keys, keys that nobody knows."""

import copy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Values that a place in a document can be given, of all kinds that JSON has, extremes among them.
VALUES = (
    *(None, True, False, 0, 1, -1, 3, 2**31 - 1, 2**31, 2**63, 2**70, -(2**40), 0.5, -1.5, 1e308, 1e400, float("nan")),
    *(
        "",
        "x",
        "0",
        "é\ud800",
        "manifest.json",
        "../up",
        "a" * 300,
        [],
        {},
        [1],
        [[]],
        [None],
        {"a": 1},
        {"": []},
        ["x", "y"],
        [1, 2],
    ),
)


@st.composite
def spoilt(draw: st.DrawFn, document: Any, max_changes: int = 3) -> Any:
    """Return a copy of a JSON document with a few changes, each at any place in it."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, max_changes))):
        places = [*_places(document)]
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(("replace", "remove", "add", "move")))
        value = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if how == "remove":
            del container[key]
        elif how == "add" and isinstance(container, dict):
            container[draw(st.sampled_from(("", "x", "offset", "dtype", "rope_theta", "quantization_config")))] = value
        elif how == "move":
            other, other_key = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[other_key])
        else:
            container[key] = value
    return document


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Return so many examples of a strategy, always the same ones."""
    found: list[Any] = []

    @settings(max_examples=count, database=None, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


def _places(value: Any) -> Any:
    """Yield every container inside a document with each of its keys or indices."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(item)
