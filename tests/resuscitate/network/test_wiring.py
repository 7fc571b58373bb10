"""Which BatchNorm alone reads a layer, in a forward pass and in a traced graph."""

import copy

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate.network.runner import Network
from resuscitate.network.wiring import observe, trace, wiring_of
from tests.compare import same_state
from tests.networks import Outputs, Residual, Shared, Untraceable, Zoo, chain, images, pruned_copy, seeded


def both_wirings(model, x):
    return observe(model, lambda: model(x)), wiring_of(trace(model), model)


def test_a_chain_pairs_every_convolution():
    for wiring in both_wirings(seeded(chain), images()):
        assert wiring.batchnorm_of == {"0": "1", "3": "4", "6": "7"}


def test_a_batchnorm_behind_a_sum_belongs_to_no_layer():
    for wiring in both_wirings(seeded(Residual), images()):
        assert wiring.batchnorm_of == {"stem": "bn0", "conv1": "bn1"}


class ReadTwice(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), how

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return {
            "sum": lambda: y + z,
            "return": lambda: (y, z),
            "dataclass": lambda: Outputs(z, y),
            "view": lambda: z * y[:, :1],
            "transpose": lambda: z + y.mT,
            "data": lambda: z + y.data,
            "shape": lambda: z * y.shape[0],
        }[self.how]()


@pytest.mark.parametrize(
    ("how", "alone"),
    [
        *((how, False) for how in ("sum", "return", "dataclass", "view", "transpose", "data")),
        ("shape", True),
    ],
)
def test_a_layer_with_a_second_reader_has_no_batchnorm(how, alone):
    model = seeded(lambda: ReadTwice(how))
    assert observe(model, lambda: model(images())).batchnorm_of == ({"conv": "bn"} if alone else {})


def test_calls_are_counted_in_order_of_execution():
    model = seeded(Shared)
    calls = observe(model, lambda: model(images())).calls
    assert [name for name in calls if name] == ["stem", "conv", "last"]
    assert calls["conv"] == 2


def test_control_flow_that_cannot_be_traced_is_observed():
    model = seeded(Untraceable)
    with pytest.raises(torch.fx.proxy.TraceError):
        trace(model)
    assert observe(model, lambda: model(images())).batchnorm_of["body.0"] == "body.1"


def test_a_trace_has_the_required_inputs_only():
    class Optional(nn.Module):
        def forward(self, x, other, mask=None, *more, **options):
            return x + other if mask is None and not more and not options else x

    assert [node.target for node in trace(Optional()).nodes if node.op == "placeholder"] == ["x", "other"]


def test_observe_removes_its_hooks():
    model = seeded(Zoo)
    observe(model, lambda: model(images()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_called_as_functions_are_counted_and_reported():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kernel = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(2, 4, 1, 1))

        def forward(self, x):
            return nn.functional.conv2d(self.conv(x), self.kernel)

    model = seeded(Functional)
    assert observe(model, lambda: model(images())).functional == {"conv2d": 1}
    report = resuscitate.repair(pruned_copy(model), model, images(), skip_first=False)
    assert "1 calls of functional conv2d run unrepaired" in report.notes


@pytest.mark.parametrize("length", [5, 7], ids=["as long as wide", "of another length"])
def test_a_linear_layer_on_sequences_has_no_batchnorm(length):
    """The channel axis of BatchNorm is axis 1, the steps of the sequence, even if there are as many as features."""
    x = torch.randn(16, length, 4, generator=torch.Generator().manual_seed(0))
    dense = seeded(lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(length)))
    assert observe(dense, lambda: dense(x)).batchnorm_of == {}
    report = resuscitate.repair(pruned_copy(dense), dense, x, method="channelwise")
    assert report.layers[0].shift_into == "new bias"
    for example in (None, x):
        torch.testing.assert_close(resuscitate.fold_batchnorm(dense, example)(x), dense(x))


def test_a_layer_whose_weight_is_used_without_a_call_is_unchanged():
    """For example the output projection in nn.MultiheadAttention, and the linear layers in torchvision's Swin."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.plain, self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.embed(x.flatten(2).mT)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = x + nn.functional.linear(x, self.plain.weight, self.plain.bias)
            return self.head(x.mean(1))

    dense = seeded(Attending)
    report = resuscitate.repair(pruned_copy(dense), dense, images())
    elsewhere = ("unchanged", "its weight is used, but not by a call of the layer")
    assert {row.name: (row.status, row.reason) for row in report.layers} == {
        "attention.out_proj": elsewhere,
        "plain": elsewhere,
        "unused": ("unchanged", "no forward pass of the first images reaches it"),
        "embed": ("refitted", ""),
        "head": ("refitted", ""),
    }


def test_bytes_and_random_numbers_of_a_forward_pass():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Dropout(0.5))
    x, output = torch.randn(2, 3, 5, 5), 2 * 4 * 5 * 5 * 4
    for training, made in ((False, 2 * output), (True, 3 * output)):
        wiring = observe(model.train(training), lambda: model(x))
        assert wiring.draws_random_numbers == training
        assert made <= wiring.bytes_made <= made + output  # one more where a module and a function both count


class TestExample:
    def test_it_has_the_first_images_of_each_tensor(self):
        net = Network(chain(), lambda model, batch: model(batch["images"]))
        batch = {"images": images(8), "labels": torch.arange(8), "name": "train"}
        example = net.example(batch)
        assert example.keys() == batch.keys()
        assert torch.equal(example["images"], batch["images"][:2])
        assert (len(example["labels"]), example["name"]) == (2, "train")

    def test_a_batch_that_cannot_be_cut_is_used_whole(self):
        net = Network(chain(), lambda model, batch: model(batch[0]))
        for batch in ((images(8), torch.ones(3)), (images(8), torch.tensor(1.0)), (images(8), object()), object()):
            assert net.example(batch) is batch

    def test_a_batch_that_the_model_does_not_accept_cut_is_used_whole(self):
        net = Network(chain(), lambda model, batch: model(batch[0].view(8, 3, 12, 12)))
        batch = (torch.randn(8, 3, 12, 12),)
        assert net.example(batch) is batch


# scripting is deprecated, and a network may have scripted parts all the same
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_module_runs_unrepaired():
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), scripted, nn.Flatten(), nn.Linear(128, 4)).eval()
    model = copy.deepcopy(dense)
    resuscitate.sparsify(model, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = resuscitate.repair(model, dense, torch.randn(96, 3, 8, 8))
    assert [row.name for row in report.layers] == ["0", "4"]
    assert report.agreement.error_after < report.agreement.error_before
    report.undo()
    assert same_state(model.state_dict(), before)


class Keeping(nn.Module):
    """Multiplies by a constant, adds a table that the first pass makes, and keeps features of the last one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.table, self.last, self.features = None, None, []

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(-1, 1, x.shape[-1])
        self.features[:] = [self.a((x + self.table) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))]
        self.last = self.features[0].relu()
        return self.b(self.last)


def test_a_trace_leaves_nothing_in_the_model():
    model = seeded(Keeping)
    names = vars(model).keys()
    for table in (None, torch.linspace(-1, 1, 9)):
        model.table = table
        nodes = [node for node in trace(model).nodes if node.op == "get_attr"]
        assert ["constant" in node.meta for node in nodes] == [True] if table is None else [False, True]
        assert vars(model).keys() == names
        assert model.table is table
        assert (model.last, model.features) == (None, [])


def test_a_model_with_constants_and_kept_features_runs_after_repairs():
    dense = seeded(Keeping)
    model, names = pruned_copy(dense), vars(dense).keys()
    for _ in range(2):
        loader = torch.utils.data.DataLoader(images(), 6)
        assert resuscitate.repair(model, dense, loader, keep_worse=True).walk == "graph"
    for net in (dense, model):
        assert vars(net).keys() == names
        assert type(net.table) is type(net.last) is type(net(images())) is torch.Tensor


class Reading(nn.Module):
    """A convolution whose weight a function reads as well, or only what kind of tensor it is."""

    def __init__(self, reads):
        super().__init__()
        self.conv, self.head, self.reads = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), reads

    def forward(self, x):
        x = x.type_as(self.conv.weight).to(self.conv.weight) + torch.zeros_like(self.conv.weight).sum()
        found = self.conv(x)
        if self.reads:
            found = found - 0.1 * nn.functional.conv2d(x[..., 1:-1, 1:-1], self.conv.weight.sum((2, 3), keepdim=True))
        return self.head(found.relu().mean((2, 3)))


@pytest.mark.parametrize("method", ["refit", "channelwise"])
@pytest.mark.parametrize("reads", [True, False])
def test_a_layer_whose_weight_a_function_reads_too_is_unchanged(reads, method):
    dense = seeded(lambda: Reading(reads))
    report = resuscitate.repair(pruned_copy(dense), dense, images(), method=method, skip_first=False)
    rows = {row.name: (row.status, row.reason) for row in report.layers}
    assert (rows["conv"] == ("unchanged", "a function reads its weight too")) == reads
