"""FLOPs by hand and as published."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.video import R2Plus1D_18_Weights, R3D_18_Weights

from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.backbones import VIDEO_BACKBONES, Backbone, Takes
from cmacc.train.networks.encoders import Encoder, EncoderConfig
from cmacc.train.networks.flops import _flops, encoder_flops, peak_flops


@pytest.mark.parametrize("groups", [1, 4])
def test_one_convolution_by_hand(groups: int) -> None:
    """8 to 12 channels, 3x3x3, 5x6x7 positions; then the head from 12 to 2 numbers. For 2 clips, two FLOPs a multiply-add."""
    with torch.device("meta"):
        conv = nn.Conv3d(8, 12, 3, padding=1, groups=groups, bias=False)
        network = nn.Sequential(nn.ReLU(), conv, nn.AdaptiveAvgPool3d(1), nn.Flatten())
        encoder = Encoder(Backbone(network, 12, Takes(8, (1, 1, 1)), (network,)), EncoderConfig(width=2, head_layers=1))
        convolution = 2 * 2 * (8 // groups) * 12 * 27 * (5 * 6 * 7)
        head = 2 * 2 * 12 * 2
        # Pixels need no gradient, so the convolution has a single product in the backward pass, the head two.
        assert _flops(encoder, torch.zeros(2, 8, 5, 6, 7)) == (convolution + head, convolution + 2 * head)
        inner = torch.zeros(2, 8, 5, 6, 7, requires_grad=True)
        assert _flops(encoder, inner) == (convolution + head, 2 * convolution + 2 * head)


@pytest.mark.parametrize(("name", "weights"), [("r3d_18", R3D_18_Weights.DEFAULT), ("r2plus1d_18", R2Plus1D_18_Weights.DEFAULT)])
def test_video_encoders_take_the_published_flops(name: str, weights: R3D_18_Weights) -> None:
    """torchvision's documentation counts multiply-adds of one clip of 16 frames of 112x112, in thousand millions."""
    with torch.device("meta"):
        encoder = Encoder(VIDEO_BACKBONES[name](), EncoderConfig(video=name, width=2, head_layers=1))
        forward, backward = _flops(encoder, torch.zeros(2, 3, 16, 112, 112))
    assert forward / 2 / 2 / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.001)
    assert 1.9 < backward / forward < 2


def test_a_step_is_queries_both_ways_and_keys_forward() -> None:
    view, config = ViewConfig(), EncoderConfig()
    one = encoder_flops(config, view)
    assert encoder_flops(config, view, clips=128) == 128 * one
    # R3D-18's stem needs no gradient of its input; the audio encoder and the heads come on top.
    assert 3.9 < one / (2 * 40.697e9) < 4.2
    assert encoder_flops(EncoderConfig("small", "small", 8, 8), view) < one / 100


def test_peaks_of_known_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("NVIDIA L4", "bf16") == 121e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_flops("NVIDIA A10G", "bf16") is None
    assert peak_flops("a processor", "float32") is None
