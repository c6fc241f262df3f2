"""Structures of batches: which differences count, and which are those of two batches of one loader."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch

from hessian_callback.measurement.batch_structure import structure_difference, structure_of

Pair = namedtuple("Pair", "x y")

IMAGE, LABEL = torch.ones(8, 3), torch.ones(8, dtype=torch.long)


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        (((IMAGE, IMAGE), LABEL), (IMAGE, LABEL), "batch[0]"),
        ((IMAGE, LABEL), (IMAGE, LABEL, IMAGE), "batch"),
        ([IMAGE, IMAGE], [IMAGE, IMAGE, IMAGE], "batch"),
        ({"x": IMAGE, "y": LABEL}, {"x": IMAGE}, "batch"),
        ({"x": IMAGE}, [IMAGE], "batch"),
        ({"x": {"a": IMAGE}}, {"x": {"a": LABEL}}, "batch['x']['a']"),
        ((IMAGE, LABEL), (IMAGE[:, None], LABEL), "batch[0]"),
        ((IMAGE, "name"), (IMAGE, 1.0), "batch[1]"),
        ([{"x": IMAGE}] * 3, [{"y": IMAGE}] * 3, "batch[0]"),
        ([{"x": IMAGE}, {"x": LABEL}], [{"x": IMAGE}] * 3, "batch"),
    ],
)
def test_another_structure_is_found_where_it_begins(one: Any, other: Any, path: str) -> None:
    for first, second in ((one, other), (other, one)):
        found = structure_difference(structure_of(first), structure_of(second))
        assert found is not None
        assert found[0] == path
        assert found[1] != found[2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((IMAGE, LABEL), [IMAGE[:2], LABEL[:2]]),
        (Pair(IMAGE, LABEL), (IMAGE, LABEL)),
        (IMAGE, torch.ones(2, 7).double()),
        # Lists of images and targets, as detection has them.
        (([IMAGE] * 3, [{"boxes": IMAGE}] * 3), ([IMAGE] * 5, [{"boxes": IMAGE}] * 5)),
        ([{"x": IMAGE}] * 3, [{"x": IMAGE}]),
        ((IMAGE, ["a", "b"]), (IMAGE, ["c"])),
        ([(IMAGE, LABEL)] * 2, [(IMAGE, LABEL)] * 4),
    ],
)
def test_batches_of_other_sizes_are_alike(one: Any, other: Any) -> None:
    assert structure_difference(structure_of(one), structure_of(other)) is None
