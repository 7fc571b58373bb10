"""What makes images a poor sample is said: sorted classes, samplers that repeat images, another normalisation."""

import copy
import io
import logging
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import resuscitate
from resuscitate.data.calibration import read_batches
from resuscitate.data.checks import run_first, warn_of_normalisation, warn_of_padding
from resuscitate.errors import CalibrationError, NonFiniteError
from resuscitate.runtime.distributed import Ranks
from tests.compare import same_state
from tests.networks import chain, images, pruned_copy, seeded

IMAGES = torch.rand(100, 1, 2, 2)
SORTED = torch.arange(10).repeat_interleave(10)
SHUFFLED = SORTED[torch.randperm(100, generator=torch.Generator().manual_seed(0))]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


class TestClassOrder:
    @pytest.mark.parametrize("kind", [tuple, list, "label", "targets", "numpy"])
    def test_a_limit_on_a_class_sorted_loader_is_warned_of(self, caplog, kind):
        pairs = [(IMAGES[i : i + 16], SORTED[i : i + 16]) for i in range(0, 100, 16)]
        if kind == "numpy":
            batches = [(images.numpy(), labels.numpy().astype(np.uint8)) for images, labels in pairs]
        else:
            batches = [{"image": x, kind: y} if isinstance(kind, str) else kind((x, y)) for x, y in pairs]
        list(read_batches(batches, max_samples=40))
        (warning,) = warnings(caplog)
        # the batch that reaches the limit is whole: its labels were seen too
        assert "sorted by class" in warning
        assert "class: images: 0: 10, 1: 10, 2: 10, 3: 10, 4: 8)" in warning

    def test_one_class_alone_is_the_worst_case(self, caplog):
        list(read_batches([(IMAGES[:64], torch.zeros(64, dtype=torch.int64))] * 2, max_batches=1))
        assert "(class: images: 0: 64)" in warnings(caplog)[0]

    @pytest.mark.parametrize(
        ("labels", "limit"),
        [(SHUFFLED, 40), (SORTED, None), (SORTED, 20), (SORTED.float(), 40), (SORTED[:, None], 40), (IMAGES, 40)],
        ids=["shuffled", "all are used", "too few to tell", "no classes", "boxes", "images to images"],
    )
    def test_nothing_is_said_otherwise(self, caplog, labels, limit):
        list(read_batches(DataLoader(TensorDataset(IMAGES, labels), 10), max_samples=limit))
        assert not warnings(caplog)


class TestPadding:
    def loader(self, images, ranks, **options):
        sampler = DistributedSampler(TensorDataset(IMAGES[:images]), ranks, rank=0, **options)
        return DataLoader(sampler.dataset, 4, sampler=sampler)

    def test_a_sampler_that_repeats_images_is_warned_of(self, caplog):
        warn_of_padding(self.loader(10, 4))
        assert "repeats 2 images" in warnings(caplog)[0]

    def test_nothing_is_said_otherwise(self, caplog):
        for loader in (self.loader(12, 4), self.loader(10, 4, drop_last=True), DataLoader(IMAGES, 4), [IMAGES], IMAGES):
            warn_of_padding(loader)
        assert not warnings(caplog)


@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_begin_with_the_same_images_are_warned_of(caplog, monkeypatch, same):
    ranks = Ranks()
    ranks.size = 2
    other = IMAGES[:2] if same else IMAGES[2:4]
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [mine, mine if same else packed(other)])
    assert torch.equal(ranks.lend(IMAGES[:2].clone()), IMAGES[:2])
    said = ["all 2 ranks begin with the same images" in warning for warning in warnings(caplog)]
    assert said == ([True] if same else [])


def packed(images):
    buffer = io.BytesIO()
    torch.save(images.clone(), buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


class TestNormalisation:
    @pytest.fixture
    def trained(self):
        dense = seeded(chain)
        resuscitate.recalibrate_batchnorm(dense, images(seed=2), progress=False)
        return dense

    @pytest.mark.parametrize("change", [lambda x: x * 4, lambda x: x / 4, lambda x: x + 9, lambda x: (x + 2) * 60])
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: [(x, None)]])
    def test_images_of_another_normalisation_are_warned_of_once(self, trained, caplog, change, wrap):
        model = pruned_copy(trained)
        resuscitate.repair(model, trained, wrap(change(images())), progress=False)
        resuscitate.repair(model, trained, wrap(change(images())), progress=False)
        said = [w for w in warnings(caplog) if "may not be normalised as the network was trained" in w]
        assert len(said) == 1
        assert all(not module._forward_pre_hooks for module in trained.modules())

    @pytest.mark.parametrize("change", [lambda x: x, lambda x: x * 1.25, lambda x: x + 0.2, lambda x: x[:15] * 9])
    def test_nothing_is_said_of_what_is_near_or_too_little(self, trained, caplog, change):
        resuscitate.repair(pruned_copy(trained), trained, change(images()), progress=False)
        assert not [w for w in warnings(caplog) if "normalised" in w]

    @pytest.mark.parametrize("wrong", [False, True])
    def test_images_are_gathered_from_small_batches(self, trained, caplog, wrong):
        given = (images() * (9 if wrong else 1)).split(1)
        resuscitate.repair(pruned_copy(trained), trained, given, progress=False)
        assert bool([w for w in warnings(caplog) if "normalised" in w]) == wrong

    def test_no_more_images_than_needed_are_looked_at(self, trained):
        seen = []
        batches = (seen.append(1) or images(40) for _ in range(9))
        warn_of_normalisation(trained, batches, trained)
        assert len(seen) == 2

    def test_nothing_is_said_of_a_batchnorm_that_was_never_trained(self, caplog):
        dense = chain().eval()
        resuscitate.repair(pruned_copy(dense), dense, images() * 9, progress=False)
        assert not [w for w in warnings(caplog) if "normalised" in w]

    @pytest.mark.parametrize("alive", [1, 3])
    @pytest.mark.parametrize("change", [None, lambda x: x * 0.229 + 0.485, lambda x: (x * 0.229 + 0.485) * 255])
    def test_near_dead_channels_have_no_say(self, caplog, alive, change):
        # as in a MobileNetV1 from Keras: of most channels the variance is far below eps, and what remains drifts
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dense = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24, eps=1e-3)).eval()
            variance, drift = 10 ** (torch.rand(24) * 6 - 10), 10 ** (torch.rand(24) * 4 - 2)
        variance[:alive], drift[:alive] = 0.4, 1
        conv, batchnorm = dense
        with torch.no_grad():
            conv.weight *= (variance / conv(images(256, seed=2)).var((0, 2, 3))).sqrt().view(-1, 1, 1, 1)
        resuscitate.recalibrate_batchnorm(dense, images(256, seed=2), progress=False)
        batchnorm.running_var *= drift
        x = images(64)
        warn_of_normalisation(dense, [x if change is None else change(x)], dense)
        assert bool([w for w in warnings(caplog) if "normalised" in w]) == (change is not None)

    def test_nothing_is_said_of_values_that_are_not_finite(self, trained, caplog):
        x = images()
        x[0] = torch.nan
        with pytest.raises(NonFiniteError):
            resuscitate.repair(pruned_copy(trained), trained, x, progress=False)
        assert not [w for w in warnings(caplog) if "normalised" in w]


def coarser(x):
    """Lossy: only the mean of each 2x2 pixels is left."""
    return nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2.0)


def augmented(x):
    """Shifted by two pixels, zeros in their place, and mirrored."""
    return nn.functional.pad(x, (2, 0, 2, 0))[..., :-2, :-2].flip(-1)


PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PIXEL_MEAN, PIXEL_STD = (torch.tensor(PIXELS[name]).view(3, 1, 1) for name in ("mean", "std"))


@pytest.mark.real_data
class TestNormalisationOfRealNetworks:
    RIGHT: ClassVar = {"as they are": lambda x: x, "coarser": coarser, "augmented": augmented, "few": lambda x: x[:16]}
    WRONG: ClassVar = {
        "0 to 1": lambda x: x * PIXEL_STD + PIXEL_MEAN,
        "0 to 255": lambda x: 255 * (x * PIXEL_STD + PIXEL_MEAN),
        "-1 to 1": lambda x: 2 * (x * PIXEL_STD + PIXEL_MEAN) - 1,
        "twice": lambda x: (x - PIXEL_MEAN) / PIXEL_STD,
        "mean not taken off": lambda x: x + PIXEL_MEAN / PIXEL_STD,
    }

    def alarms(self, caplog, dense, x):
        warn_of_normalisation(dense, [x], dense)
        return bool([w for w in warnings(caplog) if "normalised" in w])

    @pytest.fixture(params=["resnet20", "resnet32"])
    def dense(self, trained_network, request):
        return trained_network(request.param)

    @pytest.mark.parametrize("change", RIGHT.values(), ids=RIGHT)
    def test_images_as_it_was_trained_on_pass(self, real, dense, caplog, change):
        assert not self.alarms(caplog, dense, change(real[1][:64]))

    @pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
    def test_others_are_warned_of(self, real, dense, caplog, change):
        assert self.alarms(caplog, dense, change(real[1][:64]))

    @pytest.mark.parametrize("clips", [16, 64, 500])
    def test_clips_of_speech_pass(self, keywords, caplog, clips):
        network, x, _ = keywords
        assert not self.alarms(caplog, network, x[:clips])

    @pytest.mark.parametrize("change", [lambda x: x / 0.58 + 83, lambda x: x / x.std(), lambda x: x + 49])
    def test_others_than_these_clips_are_warned_of(self, keywords, caplog, change):
        network, x, _ = keywords
        assert self.alarms(caplog, network, change(x[:64]))


class TestImagesThatTheNetworkCannotRunOn:
    GIVEN: ClassVar = {
        "uint8": (images(4).to(torch.uint8), r"Tensor of shape \(\d, 3, \d+, \d+\) and dtype torch.uint8"),
        "channels last": (images(4).permute(0, 2, 3, 1), r"of shape \(\d, \d+, \d+, 3\) and dtype torch.float32"),
        "grey": (images(4)[:, :1], r"of shape \(\d, 1, .*RuntimeError: .*expected input.* to have 3 channels"),
        "one image": (images(4)[0], r"of shape \(\d, \d+, \d+\)"),
        "labels": (torch.arange(4), r"of shape \(\d,\) and dtype torch.int64"),
    }

    @pytest.mark.parametrize(("given", "what"), GIVEN.values(), ids=GIVEN)
    @pytest.mark.parametrize("method", ["refit", "bn"])
    def test_their_shape_and_the_models_own_message_are_said(self, given, what, method):
        dense = seeded(chain)
        model = pruned_copy(dense)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CalibrationError, match=f"the model cannot run on .*{what}") as found:
            resuscitate.repair(model, dense, given, method=method)
        assert str(found.value.__cause__) in str(found.value)
        assert "a normalised float tensor (N, C, H, W)" in str(found.value)
        assert ("torch.stack(images)" in str(found.value)) == (getattr(given, "ndim", 0) == 3)
        assert same_state(model.state_dict(), before)

    @pytest.mark.parametrize("given", [(torch.arange(4), images(4)), {"x": torch.arange(4.0)}, images(4)[:, 0]])
    def test_what_may_be_labels_is_told_which_entry_is_taken(self, given):
        dense = seeded(chain)
        said = "if these are labels: the first entry of a tuple or list is taken for the images, so give (images, "
        with pytest.raises(CalibrationError, match="the model cannot run") as found:
            resuscitate.repair(pruned_copy(dense), dense, [given])
        assert (said in str(found.value)) == (not isinstance(given, torch.Tensor))

    def test_an_error_of_another_class_or_of_memory_comes_as_it_is(self):
        class UsersError(Exception):
            pass

        for error in (UsersError(), NonFiniteError("conv", 0, "overflow"), MemoryError(), torch.OutOfMemoryError()):
            with pytest.raises(type(error)) as found:
                run_first(Mock(side_effect=error), images(2))
            assert found.value is error

    def test_a_batch_of_a_forward_fn_is_named_by_its_first_image(self):
        with pytest.raises(CalibrationError, match=r"cannot run on a list of shape \(3, 8, 8\) and dtype torch.uint8"):
            run_first(Mock(side_effect=TypeError("no list")), [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2)
        with pytest.raises(CalibrationError, match=r"cannot run on a str: TypeError: no list; give what"):
            run_first(Mock(side_effect=TypeError("no list")), "opaque")
