"""The wanted count through everything that happens to it."""

from __future__ import annotations

import itertools

from dspark.router.replica_count import CountRules, ReplicaCount, ScalingState

RULES = CountRules(min_count=1, max_count=4, up_cooldown_s=5.0, down_cooldown_s=10.0, start_timeout_s=20.0)


def settled(wanted: int) -> ReplicaCount:
    count = ReplicaCount(RULES)
    assert count.observe(wanted, 0.0) is None
    return count


def test_it_starts_with_what_is_there_within_bounds() -> None:
    for present in range(7):
        count = ReplicaCount(RULES)
        count.observe(present, 0.0)
        assert count.wanted == min(max(present, 1), 4)


def test_a_change_is_under_way_until_all_are_there() -> None:
    for before, after in itertools.product(range(1, 5), repeat=2):
        count = settled(before)
        count.grow(after, 100.0)
        state = count.observe(before, 101.0)
        assert state is (None if before == after else ScalingState.SCALING)
        if before != after:
            assert count.observe(after, 110.0) is None
            assert count.changed_s == 110.0, "what was seen in between is not of the new count"


def test_those_that_never_come_are_given_up_and_blocked_for_a_while() -> None:
    count = settled(1)
    count.grow(3, 100.0)
    assert [count.observe(2, t) for t in (101.0, 110.0, 120.9)] == [ScalingState.SCALING] * 3
    assert count.observe(2, 121.0) is ScalingState.UNSCHEDULABLE
    assert (count.wanted, count.is_blocked(140.9), count.is_blocked(141.1)) == (2, True, False)
    assert count.observe(2, 122.0) is None


def test_a_replica_that_dies_late_is_waited_for_from_then_on() -> None:
    count = settled(2)
    assert count.observe(1, 1000.0) is ScalingState.SCALING
    assert count.observe(2, 1010.0) is None
    assert count.wanted == 2


def test_fewer_than_the_least_is_unschedulable_for_as_long_as_it_lasts() -> None:
    count = ReplicaCount(CountRules(2, 4, 5.0, 10.0, 20.0))
    states = [count.observe(1, float(t)) for t in range(60)]
    assert states[:20] == [ScalingState.SCALING] * 20
    assert set(states[20:]) == {ScalingState.UNSCHEDULABLE}
    assert count.wanted == 2


def test_one_goes_only_after_being_spare_all_the_while() -> None:
    count = settled(3)
    times = [t for t in range(1, 40) if count.shrink_if_spare(t != 5, float(t))]
    assert times[0] == 16, "ten seconds after it was needed last"
    assert times == [
        16,
        27,
    ], "one at a time"
    assert count.wanted == 1
    assert not count.shrink_if_spare(True, 1000.0), "never below the least"


def test_more_after_a_change_wait_for_the_cooldown() -> None:
    count = settled(1)
    count.grow(2, 50.0)
    count.observe(1, 51.0)
    count.observe(2, 55.0)
    assert [count.may_grow(t) for t in (55.0, 59.9, 60.0)] == [False, False, True]
