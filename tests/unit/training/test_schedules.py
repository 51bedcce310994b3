import pytest
from pydantic import TypeAdapter, ValidationError

from training.loss_registry import schedule_of
from training.loss_settings import LiveFractionTarget, Scheduled
from training.schedules import LinearSchedule, LiveFractionController, constant, ks_schedule


def controller(**changes: float) -> LiveFractionController:
    options = {"target": 0.5, "lowest": 1.0, "highest": 16.0, "smoothing": 0.5, "gain": 0.5}
    return LiveFractionController(**{**options, **changes})


def test_a_linear_schedule_meets_both_ends_and_stays() -> None:
    schedule = LinearSchedule(0.1, 0.02, 4)
    assert [schedule.at(step) for step in (0, 1, 2, 3, 4, 100)] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.02])
    assert constant(0.3).at(0) == constant(0.3).at(10**9) == 0.3


def test_depths_move_evenly_as_whole_numbers() -> None:
    schedule = ks_schedule((8, 16), (1, 2), 7)
    assert [schedule.at(step) for step in (0, 1, 7, 9)] == [(8, 16), (7, 14), (1, 2), (1, 2)]


def test_the_controller_finds_the_number_that_keeps_the_share_on_target() -> None:
    # A batch whose share of live queries is the number / 10: half of them at 5.
    schedule = controller()
    for step in range(60):
        schedule.observe(min(1.0, schedule.at(step) / 10))
    assert schedule.at(60) == pytest.approx(5.0, rel=0.02)


def test_the_controller_stays_within_its_bounds() -> None:
    schedule = controller()
    assert schedule.at(0) == 16.0
    for _ in range(50):
        schedule.observe(0.0)
    assert schedule.at(50) == 16.0
    for _ in range(50):
        schedule.observe(1.0)
    assert schedule.at(100) == 1.0


def test_a_resumed_controller_goes_on_to_the_bit() -> None:
    shares = [0.9, 0.8, 0.3, 0.1, 0.7, 0.65]
    undisturbed, first, second = controller(), controller(), controller()
    for share in shares[:3]:
        first.observe(share)
    second.load_state_dict(first.state_dict())
    for share in shares:
        undisturbed.observe(share)
    for share in shares[3:]:
        second.observe(share)
    assert second.state_dict() == undisturbed.state_dict()
    assert second.at(0) == undisturbed.at(0)


def test_a_number_alone_is_constant_and_a_mapping_names_its_schedule() -> None:
    adapter: TypeAdapter[object] = TypeAdapter(Scheduled)
    assert adapter.validate_python(0.05) == 0.05
    linear = adapter.validate_python({"schedule": "linear", "start": 1, "end": 2, "num_steps": 10})
    assert schedule_of(linear).at(5) == 1.5  # type: ignore[arg-type]
    target = adapter.validate_python({"schedule": "live_fraction", "lowest": 1, "highest": 9})
    assert isinstance(target, LiveFractionTarget)
    assert schedule_of(target).at(0) == 9
    for refused in (0, -1, {"start": 1, "end": 2, "num_steps": 3}, {"schedule": "cosine"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(refused)
    with pytest.raises(ValidationError, match="must be below highest"):
        adapter.validate_python({"schedule": "live_fraction", "lowest": 2, "highest": 2})
