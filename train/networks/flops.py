"""Floating-point operations of a training step, and what a GPU could do at most: together the model FLOP utilisation."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.encoders import Encoder, EncoderConfig, build_encoders


def encoder_flops(config: EncoderConfig, view: ViewConfig, clips: int = 1) -> int:
    """FLOPs of one step's encoders for so many clips: queries forward and backward, keys forward; video and audio.

    Of convolutions and matrix products, a multiply-add as two. Activations that are computed again do not count: this is the
    model's work, not the hardware's. Nothing is computed: the shapes alone pass.
    """
    with torch.device("meta"):
        video, audio = build_encoders(config)
        pictures = torch.zeros(2, 3, view.frames, view.size, view.size)
        sounds = torch.zeros(2, 1, view.n_mels, view.mel_steps)
    # Two clips, since BatchNorm refuses one alone.
    return sum(2 * forward + backward for forward, backward in (_flops(video, pictures), _flops(audio, sounds))) * clips // 2


def _flops(encoder: Encoder, x: Tensor) -> tuple[int, int]:
    """Of the forward and of the backward pass."""
    # torch's own formula for the backward pass forgets groups.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        y = encoder(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops() - forward


def _convolution_backward(
    gradient: torch.Size, x: torch.Size, weight: torch.Size, *rest: object, out_shape: object = None, **options: object
) -> int:
    """As many for each gradient that is wanted, of the input and of the weight, as the forward pass took."""
    *_, transposed, _, _, wanted = rest
    each = conv_flop_count(list(x), list(weight), list(gradient), transposed=bool(transposed))
    return each * sum(list(wanted)[:2])  # type: ignore[call-overload]


PEAK_TFLOPS = {
    # NVIDIA's data sheets, dense: bf16 on tensor cores with float32 sums; then float32 as torch's convolutions take it by
    # default, in TF32 where the chip has that. Where there is no bf16, None.
    "B200": (2250, 1125),
    "H200": (989, 494),
    "H100 PCIe": (756, 378),
    "H100": (989, 494),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L4": (121, 60),
    "A10": (125, 62.5),
    "RTX A6000": (154.8, 77.4),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
    "V100": (None, 15.7),
    "T4": (None, 8.1),
}


def gpu_name(text: str) -> str | None:
    """The GPU of `PEAK_TFLOPS` that is meant, by what `torch.cuda.get_device_name` says or as people write it, as `h100-pcie`.

    None for one that is not there.
    """
    said = text.replace("-", " ").replace("_", " ")
    return next((name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", said, re.IGNORECASE)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device of this name (`torch.cuda.get_device_name`) could do in `precision`, "bf16" or "float32".

    None where that is not known.
    """
    name = gpu_name(device_name)
    if name is None:
        return None
    bf16, float32 = PEAK_TFLOPS[name]
    peak = bf16 if precision == "bf16" else float32
    return None if peak is None else peak * 1e12
