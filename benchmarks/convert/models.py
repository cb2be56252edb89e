"""The models: every architecture of torchvision with BatchNorm, and some of each family of timm's that has it."""

from __future__ import annotations

from typing import Final

TORCHVISION: Final = (
    *(
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
    ),
    *("wide_resnet50_2", "wide_resnet101_2", "densenet121", "densenet161", "densenet169", "densenet201"),
    *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn", "googlenet", "inception_v3"),
    *(
        "mobilenet_v2",
        "mobilenet_v3_small",
        "mobilenet_v3_large",
        "mnasnet0_5",
        "mnasnet0_75",
        "mnasnet1_0",
        "mnasnet1_3",
    ),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
    *(f"efficientnet_b{size}" for size in range(8)),
    *("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"),
    *(f"regnet_x_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")),
    *(f"regnet_y_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf", "128gf")),
    "maxvit_t",
    *("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    *("fcn_resnet50", "fcn_resnet101", "lraspp_mobilenet_v3_large"),
    *("r3d_18", "mc3_18", "r2plus1d_18", "s3d"),
)
TIMM: Final = (
    *(
        "resnet18d",
        "resnet26t",
        "resnet50",
        "seresnet50",
        "ecaresnet50t",
        "resnetrs50",
        "resnext50_32x4d",
        "resnetblur50",
    ),
    *(
        "resnetaa50d",
        "resnetv2_50",
        "resnetv2_50d",
        "regnetx_008",
        "regnety_008",
        "regnetz_005",
        "resnest14d",
        "resnest50d",
    ),
    *("res2net50_26w_4s", "res2next50", "densenet121", "densenetblur121d", "vgg11_bn", "vgg16_bn"),
    *("mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "tf_mobilenetv3_small_100", "lcnet_050"),
    *(
        "mobilenetv4_conv_small",
        "mobilenetv4_conv_medium",
        "efficientnet_b0",
        "efficientnet_lite0",
        "tf_efficientnet_b0",
    ),
    *("tf_efficientnet_lite0", "efficientnetv2_rw_t", "mnasnet_100", "semnasnet_100", "fbnetc_100", "spnasnet_100"),
    *("mixnet_s", "tf_mixnet_s", "ghostnet_100", "ghostnetv2_100", "repghostnet_100", "hrnet_w18_small", "hrnet_w18"),
    *("dla34", "dla60x", "dla60_res2net", "dpn48b", "dpn68", "inception_v3", "inception_v4", "inception_resnet_v2"),
    *(
        "xception41",
        "legacy_xception",
        "cspresnet50",
        "cspdarknet53",
        "darknet53",
        "cs3darknet_s",
        "repvgg_a0",
        "repvgg_b0",
    ),
    *(
        "mobileone_s0",
        "nasnetalarge",
        "pnasnet5large",
        "convmixer_768_32",
        "levit_128s",
        "levit_conv_128s",
    ),
    *("mobilevit_xxs", "mobilevitv2_050", "efficientformer_l1", "efficientformerv2_s0", "fastvit_t8", "repvit_m0_9"),
    *("rexnet_100", "selecsls42b", "skresnet18", "ese_vovnet19b_dw", "hardcorenas_a", "hgnet_tiny", "legacy_senet154"),
    *(
        "legacy_seresnet18",
        "tresnet_m",
        "fasternet_t0",
        "starnet_s1",
        "swiftformer_xs",
        "efficientvit_b0",
        "efficientvit_m0",
    ),
    *("shvit_s1", "visformer_tiny", "tiny_vit_5m_224", "eca_botnext26ts_256", "halonet26t", "gernet_s"),
)
SIZES: Final = {
    "torchvision:inception_v3": 299,
    "torchvision:s3d": 224,
    "torchvision:maxvit_t": 224,
    "timm:inception_v3": 96,
    "timm:inception_v4": 96,
    "timm:inception_resnet_v2": 96,
    "timm:nasnetalarge": 96,
    "timm:pnasnet5large": 96,
    **dict.fromkeys(
        (
            *("timm:levit_128s", "timm:levit_conv_128s", "timm:efficientformer_l1", "timm:efficientformerv2_s0"),
            *("timm:visformer_tiny", "timm:tiny_vit_5m_224", "timm:efficientvit_m0", "timm:swiftformer_xs"),
        ),
        224,
    ),
    "timm:eca_botnext26ts_256": 256,
    "timm:halonet26t": 256,
}
"""Pixels per side where 64 is too few, or another size than the model's own is refused."""
VIDEO: Final = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
SPECS: Final = (*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM))


def shape_of(spec: str) -> tuple[int, ...]:
    """The shape of the example: four images, or four clips of 16 frames."""
    side = SIZES.get(spec, 64)
    return (4, 3, 16, side, side) if spec.partition(":")[2] in VIDEO else (4, 3, side, side)
