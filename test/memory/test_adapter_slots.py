# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapter versions are on the device, while there are more of them than slots."""

from __future__ import annotations

from mace_ros.memory.adapter_slots import AdapterSlots, BASE, ServedVersion

FIRST, SECOND, THIRD = (ServedVersion('', number) for number in (1, 2, 3))


def test_the_least_recently_used_version_gives_way() -> None:
    slots = AdapterSlots(base_slot=0, first=2, count=2)
    for version in (FIRST, SECOND):
        assert slots.assign(version) == slots.slot_of(version)
        slots.pin(version)
        slots.unpin(version)
    assert {slots.slot_of(v) for v in (FIRST, SECOND)} == {2, 3}
    slots.pin(FIRST)
    slots.unpin(FIRST)
    freed = slots.slot_of(SECOND)
    assert slots.assign(THIRD) == freed
    assert slots.slot_of(SECOND) is None and slots.versions == (FIRST, THIRD)


def test_a_pinned_version_keeps_its_slot() -> None:
    slots = AdapterSlots(base_slot=0, first=1, count=1)
    slots.assign(FIRST)
    slots.pin(FIRST)
    slots.pin(FIRST)
    assert slots.assign(SECOND) is None
    slots.unpin(FIRST)
    assert slots.assign(SECOND) is None
    slots.unpin(FIRST)
    assert slots.assign(SECOND) == 1 and slots.slot_of(FIRST) is None


def test_the_base_model_is_always_in_its_slot() -> None:
    slots = AdapterSlots(base_slot=0, first=1, count=1)
    slots.pin(BASE)
    assert slots.slot_of(BASE) == 0
    slots.unpin(BASE)
    assert slots.assign(FIRST) == 1
    slots.discard(FIRST)
    assert slots.assign(SECOND) == 1


def test_versions_of_two_profiles_are_different_weights() -> None:
    assert ServedVersion('ann', 1).identity != ServedVersion('', 1).identity != BASE.identity
