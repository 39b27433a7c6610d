"""Travel and waiting: exposed is what lies in both."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.expert.lane import Lane
from parallel.expert.travel import TravelTimes, intersection

CUTS = st.lists(st.integers(0, 40), max_size=12, unique=True).map(sorted)


def _intervals(cuts):
    return list(zip(cuts[::2], cuts[1::2], strict=False))


@given(CUTS, CUTS)
def test_an_intersection_holds_what_both_hold(a, b):
    a, b = _intervals(a), _intervals(b)

    def held(intervals, unit):
        return any(start <= unit < end for start, end in intervals)

    both = intersection(a, b)
    for unit in range(40):
        assert held(both, unit) == (held(a, unit) and held(b, unit))


def test_times_are_by_kind_and_start_anew():
    times = TravelTimes()
    times.travels = [("dispatch", (0.0, 4.0)), ("combine", (4.0, 6.0)), ("dispatch", (8.0, 9.0))]
    times.waits = [(3.0, 5.0), (8.5, 10.0)]
    travels, waits = times.travels, times.waits
    assert times.take() == {
        "comm_time_dispatch": 5.0,
        "comm_exposed_dispatch": 1.5,
        "comm_time_combine": 2.0,
        "comm_exposed_combine": 1.0,
    }
    assert set(times.take().values()) == {0.0}
    times.travels, times.waits = travels, waits
    assert times.take(within=[(2.0, 3.5), (5.0, 8.75)])["comm_exposed_dispatch"] == pytest.approx(0.5 + 0.25)


def test_a_lane_notes_what_its_caller_waits_for_and_what_it_does_not():
    times = TravelTimes()
    lane = Lane(times)
    waited, hidden = (lane.start(lambda: time.sleep(0.02), kind=kind) for kind in ("dispatch", "combine"))
    waited.wait()
    time.sleep(0.05)  # computes meanwhile
    hidden.wait()
    waited.wait()
    figures = times.take()
    assert figures["comm_time_dispatch"] >= figures["comm_exposed_dispatch"] > 0
    assert figures["comm_time_combine"] > 0
    assert len(times.waits) == 0
