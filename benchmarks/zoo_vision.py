"""torchvision's and timm's networks of the table in docs/networks.md, with small inputs; some are thin or shallow.

Neither library is imported before a network is built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Entry(NamedTuple):
    """A network and what it is called with.

    ends     layers that torch-pruning has to leave alone; None: those that its graph says make the outputs
    trains   whether it can be trained by a sum of its outputs (not: a detector, which wants boxes)
    """

    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    ends: Callable[[Any], list[nn.Module]] | None = None
    trains: bool = True


NETWORKS: dict[str, Entry] = {}


def pictures(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, 3, *shape)


def _torchvision(name: str, *shape: int, of: str = "", **options: Any) -> None:
    def build() -> nn.Module:
        from torchvision import models

        home = getattr(models, of) if of else models
        return getattr(home, name)(weights=None, **options)  # type: ignore[no-any-return]

    NETWORKS[f"torchvision/{name}"] = Entry(build, pictures(*shape))


for _name in (
    *("alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121"),
    *("squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_x_400mf"),
    *("regnet_y_400mf", "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "swin_t", "swin_v2_t"),
):
    _torchvision(_name, 64, 64, num_classes=10)
_torchvision("googlenet", 64, 64, num_classes=10, init_weights=False)
_torchvision("inception_v3", 96, 96, num_classes=10, init_weights=False, aux_logits=False)


def _own(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return getattr(models, name)(num_classes=10, **options)  # type: ignore[no-any-return]


_VIT = {"image_size": 64, "patch_size": 16, "num_layers": 3, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
_MAXVIT = {"input_size": (64, 64), "stem_channels": 32, "partition_size": 2, "block_channels": [32, 64]}
_MAXVIT |= {"block_layers": [1, 1], "head_dim": 16, "stochastic_depth_prob": 0.0}
NETWORKS["torchvision/vit (3 layers)"] = Entry(partial(_own, "VisionTransformer", **_VIT), pictures(64, 64))
NETWORKS["torchvision/maxvit (2 blocks)"] = Entry(partial(_own, "MaxVit", **_MAXVIT), pictures(64, 64))


def _detector(name: str, ends: Callable[[Any], list[nn.Module]], **options: Any) -> None:
    def build() -> nn.Module:
        from torchvision.models import detection

        return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5, **options)  # type: ignore[no-any-return]

    NETWORKS[f"torchvision/{name}"] = Entry(build, pictures(96, 96), ends, trains=False)


_SMALL = {"min_size": 96, "max_size": 96}


def _two_stages(m: Any) -> list[nn.Module]:
    return [m.rpn.head.cls_logits, m.rpn.head.bbox_pred, m.backbone.fpn, m.roi_heads]


def _one_stage(m: Any) -> list[nn.Module]:
    regression = m.head.regression_head
    centres = [regression.bbox_ctrness] if hasattr(regression, "bbox_ctrness") else []
    return [m.head.classification_head.cls_logits, regression.bbox_reg, *centres]


_detector("fasterrcnn_mobilenet_v3_large_320_fpn", _two_stages, rpn_post_nms_top_n_test=50, **_SMALL)
_detector("maskrcnn_resnet50_fpn", _two_stages, rpn_post_nms_top_n_test=20, **_SMALL)
_detector("retinanet_resnet50_fpn", _one_stage, **_SMALL)
_detector("fcos_resnet50_fpn", _one_stage, **_SMALL)
_detector("ssdlite320_mobilenet_v3_large", lambda m: [m.head])
_detector("ssd300_vgg16", lambda m: [m.head])

for _name in ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
    _torchvision(_name, 64, 64, of="segmentation", num_classes=5, weights_backbone=None)
_torchvision("fcn_resnet50", 64, 64, of="segmentation", num_classes=5, weights_backbone=None, aux_loss=True)
for _name in ("r3d_18", "r2plus1d_18"):
    _torchvision(_name, 4, 32, 32, of="video", num_classes=10)
_torchvision("s3d", 16, 224, 224, of="video", num_classes=10)
_torchvision("swin3d_t", 4, 64, 64, of="video", num_classes=10)


def _mvit() -> nn.Module:
    """The first four blocks of mvit_v2_s, for eight small pictures."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    shapes = [(1, 96, 96, 1, 8), (2, 96, 192, 2, 4), (2, 192, 192, 1, 4), (4, 192, 384, 2, 2)]
    blocks = [
        MSBlockConfig(heads, narrow, wide, [3, 3, 3], [3, 3, 3], [1, step, step], [1, pool, pool])
        for heads, narrow, wide, step, pool in shapes
    ]
    how = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return MViT((64, 64), 8, blocks, num_classes=10, stochastic_depth_prob=0.0, **how)


NETWORKS["torchvision/mvit_v2 (4 blocks)"] = Entry(_mvit, pictures(8, 64, 64))


def _raft() -> nn.Module:
    from torchvision.models import optical_flow

    return optical_flow.raft_small(weights=None)


NETWORKS["torchvision/raft_small"] = Entry(_raft, lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)))


# ---- timm


def _timm(names: str, size: int = 64, **options: Any) -> None:
    for name in names.split():
        NETWORKS[f"timm/{name}"] = Entry(partial(_build_timm, name, options), pictures(size, size))


def _build_timm(name: str, options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **options)  # type: ignore[no-any-return]


_timm("vit_tiny_patch16_224", img_size=64, depth=3)
_timm("deit3_small_patch16_224 deit_tiny_distilled_patch16_224", img_size=64, depth=2)
_timm("beit_base_patch16_224 beitv2_base_patch16_224", img_size=64, depth=2)
_timm("eva02_tiny_patch14_224 vit_small_patch14_dinov2", 56, img_size=56, depth=2)
_timm("vit_small_patch16_dinov3 vit_base_patch16_siglip_224 vit_base_patch16_clip_224", img_size=64, depth=2)
_timm("cait_xxs24_224 xcit_nano_12_p16_224", img_size=64, depth=2)
_timm("naflexvit_base_patch16_gap", depth=2)
_timm("swin_tiny_patch4_window7_224", 112, img_size=112)
_timm("swinv2_tiny_window8_256", 128, img_size=128)
_timm("coatnet_nano_rw_224", img_size=64)
_timm("maxxvit_rmlp_nano_rw_256 maxvit_nano_rw_256", 128, img_size=128)
_timm("tiny_vit_5m_224", 224)
_timm(
    "convnext_atto convnextv2_atto mobilenetv4_conv_small mobileone_s0 repvgg_a0 fastvit_t8 edgenext_xx_small "
    "ghostnet_100 ghostnetv2_100 resnest14d regnety_002 regnetx_002 regnetz_b16 eca_nfnet_l0 nf_resnet26 nf_regnet_b0 "
    "efficientnetv2_rw_t tf_efficientnet_lite0 tf_efficientnet_b0 poolformer_s12 poolformerv2_s12 convformer_s18 "
    "caformer_s18 pvt_v2_b0 dla34 hrnet_w18_small tresnet_m vgg11 mobilenetv3_small_050 mobilenetv3_large_100 "
    "mobilenetv2_050 res2net50_26w_4s skresnet18 seresnet50 resnet50d resnetv2_50 cspresnet50 cspdarknet53 "
    "ese_vovnet19b_dw rexnet_100 mobilevit_xxs mobilevitv2_050 inception_next_atto starnet_s1 repvit_m0_9 "
    "repghostnet_050 efficientvit_b0 xception41 dpn48b selecsls42 densenet121 mambaout_femto lcnet_050 fasternet_t0 "
    "shvit_s1 rdnet_tiny hgnetv2_b0 convmixer_768_32"
)
_timm("inception_resnet_v2", 96)
_timm("mobilenetv4_hybrid_medium", 128)
_timm(
    "efficientformer_l1 efficientformerv2_s0 levit_128s mixer_s32_224 resmlp_12_224 gmlp_ti16_224 twins_svt_small "
    "twins_pcpvt_small hiera_tiny_224 davit_tiny focalnet_tiny_srf efficientvit_m0 volo_d1_224 visformer_tiny "
    "nest_tiny pit_ti_224 gcvit_xxtiny coat_lite_tiny convit_tiny sequencer2d_s mvitv2_tiny",
    224,
)
_timm("crossvit_tiny_240", 240)
_timm("botnet26t_256 halonet26t", 256)
