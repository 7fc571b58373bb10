"""Digests of images, functions and options: equal for equal contents in every process, different otherwise."""

import subprocess
import sys
import textwrap
from collections import UserDict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from resuscitate.utils.digest import digest_images, digest_in_order, digest_model, fingerprint, image_keys
from tests.networks import chain, images, seeded

PROGRAM = """
SCALE, HELD = 2.0, {{"shift": 0.5, "names": {{"b", "a", "c"}}}}

def helper(x):
    return x * {helper}

def make(scale, held):
    def run(model, batch, power={default}, *, sign={keyword}):
        inner = lambda x: helper(x) + HELD["shift"]
        return model(inner(batch) * SCALE * scale + held.sum(){code})
    return run
"""
SAME = {"helper": 3, "default": 1, "keyword": 1, "code": "", "scale": 2, "held": torch.ones(3), "globals": {}}


def made(**changes):
    """A function of a separate module, such as a user's script."""
    given, space = SAME | changes, {"__name__": "users_script"}
    exec(textwrap.dedent(PROGRAM).format(**given), space)
    space.update(given["globals"])
    return space["make"](given["scale"], given["held"])


class Scaled:
    """A callable object."""

    def __init__(self, scale, engine=None):
        self.scale, self.engine = scale, engine

    def __call__(self, model, batch):
        return model(batch * self.scale)

    def run(self, model, batch):
        return model(batch / self.scale)


@dataclass
class Batch:
    x: torch.Tensor
    scale: float


class TestFunctions:
    def test_the_fingerprint_is_the_same_in_this_process_and_in_another(self):
        assert fingerprint(made()) == fingerprint(made())
        assert str(fingerprint(made())).startswith("users_script.make.<locals>.run ")
        program = "from tests.resuscitate.utils.test_digest import fingerprint, made; print(fingerprint(made()))"
        # each process hashes strings differently, so the order of a set differs
        command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {program}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout.strip() == fingerprint(made())

    @pytest.mark.parametrize(
        "changes",
        [
            {"code": " + 1"},
            {"code": " - 1"},
            {"code": ".abs()"},
            {"default": 2},
            {"keyword": -1},
            {"scale": 3},
            {"held": torch.zeros(3)},
            {"held": torch.ones(3).double()},
            {"held": torch.ones(1, 3)},
            {"helper": 4},
            {"globals": {"SCALE": 4.0}},
            {"globals": {"HELD": {"shift": 0.6, "names": {"b", "a", "c"}}}},
            {"globals": {"HELD": {"shift": 0.5, "names": {"b", "a", "d"}}}},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_function_that_computes_something_else_has_another_fingerprint(self, changes):
        assert fingerprint(made(**changes)) != fingerprint(made())

    def test_the_arguments_of_a_partial_count(self):
        def run(scale, shift, model, batch):
            return model(batch * scale + shift)

        first = partial(run, 2.0, torch.ones(2))
        assert fingerprint(first) == fingerprint(partial(run, 2.0, torch.ones(2)))
        others = partial(run, 3.0, torch.ones(2)), partial(run, 2.0, torch.zeros(2)), partial(run, shift=1.0), run
        assert len({fingerprint(each) for each in (first, *others)}) == 5

    def test_the_plain_attributes_of_methods_and_callable_objects_count(self):
        assert fingerprint(Scaled(2.0, object())) == fingerprint(Scaled(2.0, object()))
        assert fingerprint(Scaled(2.0).run) == fingerprint(Scaled(2.0).run)
        ways = Scaled(2.0), Scaled(3.0), Scaled(2.0).run, Scaled(3.0).run, Scaled(torch.ones(1)), Scaled(torch.zeros(1))
        assert len({fingerprint(way) for way in ways}) == len(ways)

    def test_the_weights_of_a_network_in_the_closure_count(self):
        def through(first):
            return lambda model, batch: model(first(batch))

        one, other = seeded(chain), seeded(chain, 3)
        assert fingerprint(through(one)) == fingerprint(through(seeded(chain)))
        assert fingerprint(through(one)) != fingerprint(through(other))
        assert fingerprint(through(nn.ReLU())) != fingerprint(through(nn.LeakyReLU()))

    def test_recursive_functions_and_containers_have_a_fingerprint(self):
        def even(n):
            return n == 0 or odd(n - 1)

        def odd(n):
            return n != 0 and even(n - 1)

        assert fingerprint(even) != fingerprint(odd)
        endless: list = [1]
        endless.append(endless)
        assert fingerprint(endless) == fingerprint(endless)


def test_plain_options_are_returned_unchanged_and_others_are_digested():
    assert [fingerprint(value) for value in (None, True, 3, 0.5, "erk")] == [None, True, 3, 0.5, "erk"]
    assert fingerprint({"a": 1.0, "b": 2.0}) == fingerprint({"b": 2.0, "a": 1.0})
    assert fingerprint([nn.Conv2d, "3"]) == fingerprint([nn.Conv2d, "3"])
    values = [[1, 2], (1, 2), [2, 1], [12], ["1", "2"], {1, 2}, {1: 2}, nn.Linear, nn.Conv2d, torch.float16, b"12"]
    assert len({fingerprint(value) for value in values}) == len(values)


class Norm(nn.Module):
    """Has a function that its `repr` shows, and a buffer that is not saved."""

    def __init__(self, function, scale=1.0):
        super().__init__()
        self.function = function
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        return self.function(x * self.scale)

    def extra_repr(self):
        return repr(self.function)


def network(norm=None, activation=nn.ReLU, **options):
    return seeded(lambda: nn.Sequential(norm or Norm(lambda x: x), nn.Conv2d(3, 4, 3, **options), activation()))


class TestModels:
    @pytest.mark.parametrize(
        "other",
        [{"activation": nn.GELU}, {"dilation": 2}, {"norm": Norm(lambda x: x, 3.0)}],
        ids=["activation", "dilation", "buffer that is not saved"],
    )
    def test_models_with_the_same_state_dict_are_told_apart(self, other):
        one, two = network(), network(**other)
        assert all(torch.equal(x, two.state_dict()[key]) for key, x in one.state_dict().items())
        assert digest_model(one) != digest_model(two)

    def test_addresses_do_not_count(self):
        one, two = network(), network()
        assert repr(one) != repr(two)
        assert digest_model(one) == digest_model(two)


class TestImages:
    X = images(6)

    @pytest.mark.parametrize(
        "other",
        [
            {"b": X, "scale": 2.0, "y": (X[:1], "c")},
            {"a": X, "scale": 3.0, "y": (X[:1], "c")},
            {"a": X, "scale": 2.0, "y": (X[:1], "d")},
            {"a": X, "scale": 2.0, "y": (X[1:2], "c")},
            {"a": X.flip(0), "scale": 2.0, "y": (X[:1], "c")},
            {"a": X.double(), "scale": 2.0, "y": (X[:1], "c")},
            {"a": X.flatten(1), "scale": 2.0, "y": (X[:1], "c")},
            UserDict(a=X, scale=3.0),
            Batch(X, 2.0),
            Batch(X, 3.0),
            (X, np.ones(3)),
            (X, np.zeros(3)),
            np.ones((6, 2)),
            np.zeros((6, 2)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_all_contents_of_a_batch_count(self, other):
        batch = {"a": self.X, "scale": 2.0, "y": (self.X[:1], "c")}
        assert digest_images([batch]) == digest_images([{"y": (self.X[:1].clone(), "c"), "scale": 2.0, "a": self.X}])
        assert digest_images([batch]) != digest_images([other])

    def test_batches_of_other_types_have_different_digests(self):
        kinds = UserDict(a=self.X), UserDict(a=self.X + 1), Batch(self.X, 2.0), Batch(self.X, 3.0)
        kinds += (self.X, np.ones(3)), (self.X, np.zeros(3))
        assert len({digest_images([batch]) for batch in kinds}) == len(kinds)

    def test_only_digest_in_order_depends_on_the_order_and_neither_on_the_split(self):
        x = self.X
        assert digest_images([x]) == digest_images(x.flip(0).split(4))
        assert digest_in_order([x]) == digest_in_order(x.split(4))
        assert digest_in_order([x]) != digest_in_order([x.flip(0)])


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_cannot_share_have_the_keys_of_their_copies():
    rgb = np.random.default_rng(0).random((4, 3, 5, 5), dtype=np.float32)
    fixed = rgb.copy()
    fixed.flags.writeable = False
    reversed_ = rgb[:, ::-1]
    assert image_keys(reversed_) == image_keys(reversed_.copy())
    assert image_keys(fixed) == image_keys(rgb) != image_keys(reversed_)
