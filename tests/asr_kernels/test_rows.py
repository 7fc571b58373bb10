"""Moments as rows are the moments as matrices."""

from functools import reduce

import pytest
import torch

from asr_kernels import PatchMoments, RowMoments, Window, patch_moments, row_moments
from tests.asr_kernels.test_patches import assert_near

PARTS = (3, 5, 1, 4)


def parts(dtype=torch.float32, inputs=60, offset=2.0):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            (torch.randn(count, 2, inputs, generator=generator) * 3 + offset).to(dtype),
            (torch.randn(count, 2, 4, generator=generator) - 1).to(dtype),
        )
        for count in PARTS
    ]


def moments(found):
    return PatchMoments(found.count, found.mean, found.target, found.xx, found.xy, found.yy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("offset", [2.0, 3e3])
def test_merged_rows_are_the_merged_matrices(dtype, offset):
    batches = parts(dtype, offset=offset)
    rows = reduce(RowMoments.merge, [row_moments(*batch, 30) for batch in batches])
    assert isinstance(rows, RowMoments)
    x, y = (torch.cat(each).double() for each in zip(*batches, strict=True))
    assert_near(moments(rows), patch_moments(x, y, Window()))
    torch.testing.assert_close(rows.diagonal, rows.xx.diagonal(dim1=1, dim2=2))


def test_without_some_rows_are_the_others():
    first, *rest = (row_moments(*batch, 30) for batch in parts())
    others = reduce(RowMoments.merge, rest)
    assert_near(moments(first.merge(others).without(first)), moments(others), tolerance=1e-6)


def test_more_rows_than_allowed_become_the_matrix():
    batches = parts()
    found = reduce(lambda one, other: one.merge(other), [row_moments(*batch, 26) for batch in batches])
    assert isinstance(found, PatchMoments)
    x, y = (torch.cat(each).double() for each in zip(*batches, strict=True))
    assert_near(found, patch_moments(x, y, Window()))


def test_some_of_the_outputs():
    found = row_moments(*parts()[1], 30)
    groups, rows = torch.tensor([[0]]), torch.tensor([[2, 0]])
    assert_near(moments(found.of_channels(groups, rows)), moments(found).of_channels(groups, rows))


def test_no_rows_at_all():
    nothing, some = (row_moments(*(each[:count] for each in parts()[0]), 30) for count in (0, 3))
    assert nothing.count == 0
    assert_near(moments(some.merge(nothing)), moments(some))
    assert_near(moments(nothing.merge(some)), moments(some))
