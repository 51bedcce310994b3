"""Who is let in, told by a clock that the test turns."""

import pytest

from serving.engine.admission import Admission
from serving.engine.errors import OverloadedError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def admission(clock: Clock, *, most_inside: int = 4, most_seconds: float = 10.0) -> Admission:
    return Admission("pictures", most_inside=most_inside, most_seconds=most_seconds, clock=clock)


def pass_through(room: Admission, clock: Clock, seconds: float, *, times: int = 1) -> None:
    for _ in range(times):
        with room.entering():
            clock.now += seconds


def test_as_many_as_there_is_room_for_are_let_in_and_no_more(clock: Clock) -> None:
    room = admission(clock, most_inside=2)
    with room.entering(), room.entering():
        assert room.num_inside == 2
        with pytest.raises(OverloadedError, match="2 pictures are being worked on, at most 2"), room.entering():
            pass
    with room.entering():
        pass
    assert room.num_inside == 0


def test_who_may_not_be_refused_counts_for_the_others(clock: Clock) -> None:
    room = admission(clock, most_inside=1, most_seconds=1.0)
    pass_through(room, clock, 0.9, times=5)
    with room.entering(may_be_refused=False), room.entering(may_be_refused=False):
        assert room.num_inside == 2
        with pytest.raises(OverloadedError), room.entering():
            pass
    assert room.num_inside == 0


def test_an_empty_room_lets_in_what_is_larger_than_it(clock: Clock) -> None:
    room = admission(clock, most_inside=2)
    with room.entering(5):
        assert room.num_inside == 5
        with pytest.raises(OverloadedError), room.entering():
            pass


def test_the_rate_is_measured_while_busy_alone(clock: Clock) -> None:
    room = admission(clock)
    for _ in range(50):
        pass_through(room, clock, 0.5)
        clock.now += 100  # nobody is inside
    assert room.seconds_each == pytest.approx(0.5)


def test_a_newer_rate_replaces_an_older_one(clock: Clock) -> None:
    room = admission(clock)
    pass_through(room, clock, 0.01, times=200)
    pass_through(room, clock, 1.0, times=200)
    assert room.seconds_each == pytest.approx(1.0, rel=0.05)


def test_work_done_at_the_same_time_counts_as_the_time_it_takes_together(clock: Clock) -> None:
    room = admission(clock)
    for _ in range(20):
        with room.entering(4):
            clock.now += 1.0
    assert room.seconds_each == pytest.approx(0.25)


def test_who_would_have_to_stay_too_long_is_told_when_to_come_back(clock: Clock) -> None:
    room = admission(clock, most_inside=100, most_seconds=3.0)
    pass_through(room, clock, 1.0, times=20)
    with room.entering(), room.entering():
        with room.entering():
            pass  # three seconds are allowed
        with pytest.raises(OverloadedError) as refusal, room.entering(deadline_seconds=1.5):
            pass
        assert refusal.value.retry_after_seconds == pytest.approx(1.5, rel=0.5)
    with room.entering(deadline_seconds=0.001):
        pass  # nobody is before it: only trying can tell whether it has become faster


def test_what_fails_leaves_the_room_but_says_nothing_about_the_rate(clock: Clock) -> None:
    room = admission(clock)
    pass_through(room, clock, 1.0, times=10)
    with pytest.raises(RuntimeError), room.entering():
        raise RuntimeError
    assert room.num_inside == 0
    assert room.seconds_each == pytest.approx(1.0)
