"""Tensors in nested batches: the number of images and the total bytes."""

import pytest
import torch

from resuscitate.utils.nested import bytes_of, count_images


@pytest.mark.parametrize(
    ("batch", "count"),
    [(torch.zeros(10, 3), 10), ({"scale": torch.tensor(2.0), "text": "a", "x": [torch.zeros(3, 2)]}, 3), ("opaque", 1)],
)
def test_images_are_counted_along_the_first_tensor_with_a_batch_axis(batch, count):
    assert count_images(batch) == count


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 5), 60),
        (torch.zeros(3, 5).numpy(), 60),
        ({"x": torch.zeros(2, 2, dtype=torch.uint8), "name": ["a"]}, 4),
        ((torch.zeros(1), [torch.zeros(2), {"y": torch.zeros(3)}]), 24),
        ("opaque", 0),
    ],
)
def test_bytes_are_summed_over_all_tensors(batch, size):
    assert bytes_of(batch) == size
