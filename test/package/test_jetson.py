# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The versions for JetPack are within the ranges that the package asks for."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = sorted(ROOT.glob('constraints-jetpack*.txt'))


def pins(path: Path) -> dict[str, str]:
    """Return the version of each package in a file of constraints."""
    lines = (line.split('#')[0].strip() for line in path.read_text().splitlines())
    return {name.lower(): version for name, _, version in (
        line.partition('==') for line in lines if line)}


@pytest.mark.parametrize('path', CONSTRAINTS, ids=lambda path: path.stem)
def test_the_constraints_name_a_version_of_each_requirement(path: Path) -> None:
    versions = pins(path)
    assert all(versions.values())
    for line in metadata.requires('mace-ros') or ():
        requirement = Requirement(line)
        if requirement.marker is not None or requirement.name == 'torch':    # NVIDIA's own
            continue
        assert requirement.specifier.contains(versions[requirement.name.lower()]), line


def test_torch_of_jetpack_6_gets_the_numpy_that_it_was_built_for() -> None:
    assert pins(ROOT / 'constraints-jetpack6.txt')['numpy'].startswith('1.')
    assert not any('torch' in pins(path) for path in CONSTRAINTS)
