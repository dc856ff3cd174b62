"""The DALI graph: frames and sound in, augmented pictures and log-mel out. One definition for CPU and GPU.

The way in differs. By `nvdec` the MP4 bytes go in, and NVDEC decodes the wanted frames; DALI has no CPU decoder for H.264, so
by `frames` they come in decoded, cut and scaled (`frames.decode_frames`, on threads). All that follows is the same graph on
either device. It draws nothing by itself: what happens to a clip is in its `View`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from cmacc.train.loading.constants import FLOOR_DB, PICTURE_MEAN, PICTURE_STD
from cmacc.train.loading.views import View, ViewConfig

_MIDDLE_GREY = 128.0
_BLUR_RADIUS = 3  # sigmas

Decoder = Literal["nvdec", "frames"]


class Graph:
    """A built pipeline for batches of up to `batch` clips.

    device: "cpu" or "gpu", where pictures and log-mel are made. decoder: what `run` is given as video. pictures: False leaves
    the video half out, for sounds that have none.
    """

    def __init__(
        self,
        config: ViewConfig,
        batch: int,
        device: str,
        threads: int = 2,
        *,
        decoder: Decoder = "frames",
        pictures: bool = True,
    ) -> None:
        self.config, self.device, self.decoder, self.pictures = config, device, decoder, pictures
        options: dict[str, Any] = {
            "batch_size": batch,
            "num_threads": threads,
            "device_id": torch.cuda.current_device() if device == "gpu" else None,
            "prefetch_queue_depth": 1,
            "enable_conditionals": True,
            # else (the default) it takes and gives back 300 MB each run, in pieces that malloc never quite returns
            "exec_dynamic": False,
        }
        self.pipeline = _pipeline(config, device, decoder, pictures, **options)
        self.pipeline.build()
        self._rooms = _Rooms()

    def run(
        self,
        video: Sequence[NDArray[np.uint8]],
        audio: Sequence[NDArray[np.uint8]],
        views: Sequence[View],
        numbers: Sequence[NDArray[np.integer]] = (),
        cut: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor]:
        """One batch. video: by `frames` those of each view, (F, size, size, 3), by `nvdec` the MP4 bytes, (n,), with the
        `numbers` of the frames that are wanted, (F,). audio: FLAC, Opus, Vorbis or WAV bytes, (n,); cut: the second of the
        clip's sound at which they begin (default: 0).

        Returns pictures float32 (B, 3, F, size, size), normalised, and log-mel float32 (B, 1, bands, steps), normalised.
        Raises RuntimeError when a clip does not decode; only `culprit` can be asked after that.
        """
        feed: dict[str, list[Any]] = {}
        if self.pictures:
            feed |= {"video": list(video), "mirror": [np.int32(v.mirror) for v in views], **_colours(views)}
            if self.config.blur:
                feed["sigma"] = [np.float32(v.blur_sigma) for v in views]
            if self.decoder == "nvdec":
                feed["numbers"] = [np.asarray(n, np.int32) for n in numbers]
                feed["roi_start"] = [np.array(v.crop[:2], np.float32) for v in views]
                feed["roi_end"] = [np.array([v.crop[0] + v.crop[2], v.crop[1] + v.crop[3]], np.float32) for v in views]
        rate = self.config.audio_rate
        begins = cut or [0.0] * len(views)
        feed["audio"] = list(audio)
        feed["start_sample"] = [np.int32(round((v.sound_s - at) * rate)) for v, at in zip(views, begins, strict=True)]
        feed["gain"] = [np.float32(v.gain) for v in views]
        if self.config.masks:
            masks = [np.array(v.masks, np.float32).reshape(-1, 4) for v in views]
            feed["mask_at"], feed["mask_size"] = [m[:, :2].ravel() for m in masks], [m[:, 2:].ravel() for m in masks]
        for name, values in feed.items():
            self.pipeline.feed_input(name, [np.asarray(v) for v in values])
        *pictures, mel = self.pipeline.run()
        return self._taken(pictures[0]) if pictures else torch.empty(0), self._taken(mel).unsqueeze(1)

    def _taken(self, batch: Any) -> Tensor:
        """A copy: DALI uses its buffer again at the next run."""
        made = torch.from_dlpack(batch.as_tensor())
        if made.is_cuda:
            return made.clone()
        room = self._rooms.like(made)
        np.copyto(room, made.numpy())  # by this thread alone: those that torch would wake spin for longer than it takes
        return torch.from_numpy(room)

    def culprit(self, *given: Sequence[Any]) -> tuple[int, str] | None:
        """Place of the first clip that fails by itself, and DALI's reason; a batch fails as a whole and does not say. given: what
        `run` was, in its order."""
        alone = Graph(self.config, 1, self.device, decoder=self.decoder, pictures=self.pictures)
        for at in range(len(given[1])):
            try:
                alone.run(*(column[at : at + 1] for column in given))
            except RuntimeError as error:
                text = str(error)
                return at, (text.partition("encountered:")[2] or text).strip().partition("\n")[0]
        return None

    def sounds(self, audio: Sequence[NDArray[np.uint8]], start_s: Sequence[float]) -> Tensor:
        """Log-mel alone, float32 (B, 1, bands, steps), of sounds from `start_s` seconds on. For a graph without pictures."""
        return self.run([], audio, [View(0, (0, 0, 2, 2), sound_s=s) for s in start_s])[1]


def _colours(views: Sequence[View]) -> dict[str, list[Any]]:
    """Brightness, contrast about middle grey, saturation and normalisation in one: frames / coloured + greys * grey + shift.

    All are affine, so nothing is clipped between them, as it would be were each to make bytes of its own.
    """
    brightness, contrast, saturation = (
        np.array([getattr(v, name) for v in views], np.float64) for name in ("brightness", "contrast", "saturation")
    )
    gain = brightness * contrast / PICTURE_STD
    shift = (_MIDDLE_GREY * (1 - contrast) - PICTURE_MEAN) / PICTURE_STD
    return {
        # a divisor: at saturation 0 nothing of the colours is left
        "coloured": list((1 / np.maximum(saturation * gain, 1e-9)).astype(np.float32)),
        "grey": list(((1 - saturation) * gain).astype(np.float32)),
        "shift": list(shift.astype(np.float32)),
    }


class _Rooms:
    """Memory for batches that is used again once nobody holds the batch, nor any part of it: new memory of that size costs four
    times what the copying does, and where the system gives it in pieces it never quite goes back."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[NDArray[np.float32]]] = {}

    def like(self, tensor: Tensor) -> NDArray[np.float32]:
        """An array of the shape of a float32 tensor. A tensor made of it holds it, and so do the parts of that tensor."""
        free = self._free.setdefault(tuple(tensor.shape), [])
        room = free.pop() if free else np.empty(tensor.shape, np.float32)
        lent = room.view()
        weakref.finalize(lent, free.append, room).atexit = False
        return lent


def _given(name: str, dtype: Any = types.FLOAT, ndim: int = 0, **options: Any) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True, **options)


@pipeline_def
def _pipeline(config: ViewConfig, device: str, decoder: Decoder, pictures: bool) -> Any:
    mel = _log_mel(config, device)
    return (_pictures(config, device, decoder), mel) if pictures else mel


def _frames(config: ViewConfig, device: str, decoder: Decoder) -> Any:
    """Cut and scaled to size, uint8 (F, size, size, 3)."""
    if decoder == "frames":
        # not copied on the way in: on a CPU all is done with them when `run` returns
        made = fn.external_source(name="video", dtype=types.UINT8, layout="FHWC", batch=True, no_copy=device != "gpu")
        return made.gpu() if device == "gpu" else made
    whole = fn.decoders.video(
        _given("video", types.UINT8, 1),
        device="mixed",
        frames=_given("numbers", types.INT32, 1),
        pad_mode="edge",
        build_index=False,
        affine=False,
    )
    return scaled(whole, config.size, _given("roi_start", ndim=1), _given("roi_end", ndim=1))


def scaled(frames: Any, size: int, roi_start: Any, roi_end: Any) -> Any:
    """The part of `frames` from (top, left) to (bottom, right), pixels, as squares: as `decode_frames` makes them by itself."""
    return fn.resize(
        frames, size=[size, size], roi_start=roi_start, roi_end=roi_end, interp_type=types.INTERP_LINEAR, antialias=True
    )


def _pictures(config: ViewConfig, device: str, decoder: Decoder) -> Any:
    frames = _frames(config, device, decoder)
    if config.blur:
        sigma = _given("sigma")
        if sigma > 0:  # for each clip by itself
            frames = fn.gaussian_blur(frames, sigma=sigma, window_size=2 * int(np.ceil(_BLUR_RADIUS * config.blur_sigma)) + 1)
    mirror = _given("mirror", types.INT32)
    planar = {"mirror": mirror, "output_layout": "CFHW", "dtype": types.FLOAT}
    grey = fn.color_space_conversion(frames, image_type=types.RGB, output_type=types.GRAY)
    coloured = fn.crop_mirror_normalize(frames, mean=[0.0] * 3, std=_given("coloured"), **planar)
    return coloured + (fn.crop_mirror_normalize(grey, **planar) * _given("grey") + _given("shift"))


def _log_mel(config: ViewConfig, device: str) -> Any:
    """10 log10 of the mel power spectrum (HTK scale, no normalisation, windows centred, edges reflected): equal to
    torchaudio.transforms.MelSpectrogram(power=2, norm=None, mel_scale="htk")."""
    sound, _ = fn.decoders.audio(
        _given("audio", types.UINT8, 1), dtype=types.FLOAT, downmix=True, sample_rate=float(config.audio_rate)
    )
    samples = round(config.view_s * config.audio_rate)
    first = _given("start_sample", types.INT32)
    sound = fn.slice(sound, first, samples, axes=[0], out_of_bounds_policy="pad", fill_values=0.0)
    if device == "gpu":
        sound = sound.gpu()
    # As torch does, and DALI does not: the window in the middle of the transform, and its last sample not the first again.
    # Half a sample later makes up to 2 dB where the spectrum has a deep notch.
    left = (config.n_fft - config.window) // 2
    window = torch.nn.functional.pad(torch.hann_window(config.window), (left, config.n_fft - config.window - left))
    power = fn.spectrogram(
        sound * _given("gain"),
        nfft=config.n_fft,
        window_length=config.n_fft,
        window_step=config.hop,
        window_fn=window.tolist(),
        power=2,
        center_windows=True,
        reflect_padding=True,
    )
    mel = fn.mel_filter_bank(
        power,
        sample_rate=float(config.audio_rate),
        nfilter=config.n_mels,
        freq_low=config.mel_low_hz,
        freq_high=config.mel_high_hz,
        mel_formula="htk",
        normalize=False,
    )
    decibels = fn.to_decibels(mel, multiplier=10.0, reference=1.0, cutoff_db=FLOOR_DB)
    made = (decibels - config.mel_mean_db) / config.mel_std_db
    if config.masks:
        masks = {"anchor": _given("mask_at", ndim=1), "shape": _given("mask_size", ndim=1)}
        made = fn.erase(made, axes=[0, 1], fill_value=0.0, **masks)  # 0 is the mean
    return made
