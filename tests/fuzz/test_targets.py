"""Every fuzz target on its samples, and on a bounded number of mutated ones, always the same."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS
from tests.memory import bounded_memory

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", TARGETS)]

_SAMPLES_MAX = 60
_ODD = (b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f", b"\x80", b"\xff" * 8, b"../")


@pytest.fixture(autouse=True)
def _bounded():
    with bounded_memory():
        yield


def mutated(samples: list[bytes]) -> st.SearchStrategy[bytes]:
    """A sample with a few changes, or two samples joined."""

    @st.composite
    def strategy(draw) -> bytes:
        data = draw(st.sampled_from(samples))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            how = draw(st.integers(0, 5))
            if how == 0:
                data = data[:at]
            elif how == 1:
                data = data[:at] + data[at + draw(st.integers(1, 9)) :]
            elif how == 2:
                data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
            elif how == 3:
                data = data[:at] + draw(st.sampled_from(samples))[:200_000]
            else:
                piece = draw(
                    st.sampled_from(_ODD) if how == 4 else st.binary(min_size=1, max_size=3)
                )
                data = data[:at] + piece + data[at + len(piece) :]
        return data

    return strategy()


def test_samples(name):
    target = TARGETS[name]
    samples = target.samples()
    assert samples
    for sample in samples[:: len(samples) // _SAMPLES_MAX + 1]:
        target.run(sample)


def test_mutated_samples(name):
    target = TARGETS[name]

    @settings(
        max_examples=target.examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(mutated(list(target.samples())), st.binary(max_size=300)))
    def run(data: bytes) -> None:
        target.run(data)

    run()
