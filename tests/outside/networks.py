"""Networks of torchvision, timm and transformers with random weights, at small input sizes, some of them narrowed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_declared: list[torch.library.Library] = []  # a library that is collected takes its declarations with it


def package(name: str) -> Any:
    """An installed package. Raises ImportError where it is not.

    The wheels of torchvision on PyPI are built for CUDA: beside a CPU build of torch their extension does not load, and
    what needs no custom operator works once the two that torchvision asks for on import are declared by name.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError:
        if _declared:
            raise
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            _declared[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module(name)


@dataclass(frozen=True)
class Outside:
    """A network from outside: its package, its name there, how to make it, and the size of its images."""

    package: str
    name: str
    make: Callable[[], nn.Module]
    size: int = 64
    pattern: str = "unstructured"

    def __str__(self) -> str:
        return f"{self.package}:{self.name}"

    def build(self, count: int = 16) -> tuple[nn.Module, Tensor]:
        """The network and `count` images for it. No parameter is zero, and BatchNorms know images like these."""
        with suppress(ImportError):
            package("torchvision")  # before timm and transformers, which import it where it is installed
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make()
            images = smooth_images(2 * count, self.size)
            liven(model)
            settle(model, images)
        return model.eval(), images[:count]


def smooth_images(count: int, size: int) -> Tensor:
    """(count, 3, size, size) images: coarse patterns under noise, no two channels alike."""
    coarse = torch.randn(count, 3, 4, 4)
    patterns = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return (patterns + 0.3 * torch.randn(count, 3, size, size)) * torch.tensor([0.8, 1.0, 1.2]).view(-1, 1, 1)


@torch.no_grad()
def liven(model: nn.Module) -> None:
    """Parameters that all start as one value, such as zero gains that shut off a residual branch, become random."""
    for parameter in model.parameters():
        if parameter.min() == parameter.max():
            parameter.uniform_(0.5, 1.0) if parameter.any() else parameter.normal_(0, 0.1)


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """BatchNorms get the statistics of these images, in one forward pass with only them in training mode."""
    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _torchvision(name: str, size: int = 64, pattern: str = "unstructured", **options: Any) -> Outside:
    def make() -> nn.Module:
        return package("torchvision.models").get_model(name, weights=None, num_classes=10, **options)

    return Outside("torchvision", name, make, size, pattern)


def _timm(name: str, size: int = 64, pattern: str = "unstructured", **options: Any) -> Outside:
    return Outside("timm", name, lambda: package("timm").create_model(name, num_classes=10, **options), size, pattern)


def _transformers(name: str, size: int = 64, head: str = "ForImageClassification", **options: Any) -> Outside:
    def make() -> nn.Module:
        library = package("transformers")
        return getattr(library, name + head)(getattr(library, f"{name}Config")(num_labels=10, **options))

    return Outside("transformers", name + head.removeprefix("ForImageClassification"), make, size)


def _efficientnet() -> nn.Module:
    found = package("torchvision.models.efficientnet")
    setting, last = found._efficientnet_conf("efficientnet_b0", width_mult=0.5, depth_mult=1.0)
    return found.EfficientNet(setting, 0.2, num_classes=10, last_channel=last)


def _densenet() -> nn.Module:
    return package("torchvision.models").DenseNet(12, (6, 12, 24, 16), 24, num_classes=10)


def _vgg() -> nn.Module:
    found = package("torchvision.models.vgg")
    model = found.VGG(found.make_layers([16, "M", 32, "M", 64, 64, "M", 64, 64, "M", 64, 64, "M"], batch_norm=True))
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(256, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return model


def _googlenet() -> nn.Module:
    found = package("torchvision.models.googlenet")
    conv = _quarter(found.BasicConv2d)
    blocks = [conv, partial(found.Inception, conv_block=conv), found.InceptionAux]
    model = found.GoogLeNet(10, aux_logits=False, blocks=blocks, init_weights=True)
    model.fc = nn.Linear(256, 10)
    return model


def _inception() -> nn.Module:
    found = package("torchvision.models.inception")
    conv = _quarter(found.BasicConv2d)
    blocks = [partial(getattr(found, f"Inception{letter}"), conv_block=conv) for letter in "ABCDE"]
    model = found.Inception3(10, False, inception_blocks=[conv, *blocks, found.InceptionAux], init_weights=True)
    model.fc = nn.Linear(512, 10)
    return model


def _quarter(block: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The block with a quarter of its channels, but for those of the image."""
    return lambda c_in, c_out, **options: block(c_in if c_in == 3 else c_in // 4, c_out // 4, **options)


def _repvgg() -> nn.Module:
    found = package("timm.models.byobnet")
    blocks = found._rep_vgg_bcfg(d=(2, 4, 14, 1), wf=(0.25, 0.25, 0.25, 0.25))
    return found.ByobNet(found.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=16), num_classes=10)


def _mixer() -> nn.Module:
    return package("timm.models.mlp_mixer").MlpMixer(10, img_size=64, patch_size=16, num_blocks=3, embed_dim=64)


def _convnext() -> nn.Module:
    found = package("torchvision.models.convnext")
    stages = [(16, 32, 1), (32, 64, 1), (64, 128, 2), (128, None, 1)]
    return found.ConvNeXt([found.CNBlockConfig(*stage) for stage in stages], num_classes=10)


def _vit() -> nn.Module:
    found = package("torchvision.models.vision_transformer")
    return found.VisionTransformer(32, 8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)


def _swin() -> nn.Module:
    found = package("torchvision.models.swin_transformer")
    return found.SwinTransformer([4, 4], 16, [2, 2, 2, 2], [1, 2, 4, 8], [4, 4], num_classes=10)


def _deeplab() -> nn.Module:
    found = package("torchvision.models.segmentation.deeplabv3")
    backbone = package("torchvision.models").mobilenet_v3_small(weights=None, dilated=True, width_mult=0.5).features
    stages = package("torchvision.models._utils").IntermediateLayerGetter(backbone, {"3": "aux", "8": "out"})
    auxiliary = package("torchvision.models.segmentation.fcn").FCNHead(16, 5)
    return found.DeepLabV3(stages, found.DeepLabHead(24, 5), auxiliary)


SEGFORMER = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 3, 4]}
NETWORKS = [
    _torchvision("resnet50", pattern="filter", width_per_group=8),
    _torchvision("mobilenet_v2", width_mult=0.5),
    _torchvision("mobilenet_v3_small", width_mult=0.5),
    Outside("torchvision", "efficientnet_b0", _efficientnet),
    Outside("torchvision", "densenet121", _densenet),
    Outside("torchvision", "vgg11_bn", _vgg),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("regnet_y_400mf", pattern="filter"),
    Outside("torchvision", "googlenet", _googlenet),
    Outside("torchvision", "inception_v3", _inception, 96),
    Outside("torchvision", "convnext", _convnext),
    Outside("torchvision", "vit", _vit, 32),
    Outside("torchvision", "swin", _swin),
    Outside("torchvision", "deeplabv3", _deeplab, pattern="filter"),
    _timm("resnet50", channels=(8, 16, 32, 64)),
    _timm("tf_efficientnet_b0", pattern="filter"),
    Outside("timm", "repvgg_a0", _repvgg),
    _timm("ghostnet_050"),
    _timm("mobilenetv4_conv_small_050"),
    _timm("resnetv2_50", channels=(32, 64, 128, 256)),
    _timm("nf_resnet50", channels=(32, 64, 128, 256)),
    Outside("timm", "mixer", _mixer),
    _timm("deit_tiny_patch16_224", img_size=64, depth=2, embed_dim=96),
    _timm("test_vit_relpos", img_size=64),
    _timm("starnet_s050"),
    _timm("mobilevit_xxs"),
    _timm("edgenext_xx_small"),
    _timm("efficientvit_m0", img_size=64),
    _timm("fastvit_t8"),
    _timm("ese_vovnet19b_slim_dw"),
    _timm("lcnetv2_small"),
    _timm("pvt_v2_b0"),
    _timm("dla46x_c"),
    _transformers("ResNet", embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2]),
    _transformers("RegNet", embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 2, 2, 1], groups_width=16),
    _transformers("MobileNetV2", depth_multiplier=0.35),
    _transformers("ConvNext", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1]),
    _transformers("ViT", 32, hidden_size=64, intermediate_size=128, num_hidden_layers=3, image_size=32, patch_size=8),
    _transformers("Segformer", **SEGFORMER),
    _transformers("Segformer", head="ForSemanticSegmentation", decoder_hidden_size=32, **SEGFORMER),
]
