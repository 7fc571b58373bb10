"""Tensors in nested batches: the number of images and the total bytes."""

import pytest
import torch

from resuscitate.utils.digest import image_keys
from resuscitate.utils.nested import bytes_of, count_images


@pytest.mark.parametrize(
    ("batch", "count"),
    [(torch.zeros(10, 3), 10), ({"scale": torch.tensor(2.0), "text": "a", "x": [torch.zeros(3, 2)]}, 3), ("opaque", 1)],
)
def test_images_are_counted_along_the_first_tensor_with_a_batch_axis(batch, count):
    assert count_images(batch) == count


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_list_of_images_without_a_batch_axis_counts_each(channels):
    images = [torch.zeros(channels, size, 8) for size in (8, 9, 10, 11, 12)]
    assert count_images(images) == count_images([image.numpy() for image in images]) == 5
    assert count_images((images, [{"boxes": torch.zeros(2, 4)}] * 5)) == 5  # as detectors' loaders give them
    assert count_images((tuple(images), ())) == count_images({"ids": [1, 2], "images": images}) == 5
    assert len(set(image_keys(images))) == 5
    assert image_keys(images[:2]) == image_keys((images, []))[:2]


def test_signals_with_labels_or_targets_are_no_list_of_images():
    signals = torch.zeros(7, 3, 100)
    for batch in ([signals], [signals, torch.zeros(7)], (signals, torch.zeros(7, 3, 100)), [signals, signals[:, :1]]):
        assert count_images(batch) == 7
    assert count_images([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)]) == 3  # not the same channels


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
