"""The DALI graph: frames and sound in, augmented pictures and log-mel out. One definition for CPU and GPU.

On a GPU the MP4 bytes go in and NVDEC decodes them. DALI has no CPU decoder for H.264, so there frames come in already
decoded (by `frames.decode_frames`, on threads); all that follows is the same graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from cmacc.train.views import View, ViewConfig

PICTURE_MEAN, PICTURE_STD = 0.45 * 255, 0.225 * 255
"""Kinetics' usual constants, the same for all channels: colour jitter makes finer ones meaningless."""
FLOOR_DB = -100.0


class Graph:
    """A built pipeline for batches of up to `batch` clips that all have `fps` frames per second.

    pictures: False leaves the video half out, for sounds that have none.
    """

    def __init__(
        self, config: ViewConfig, fps: float, batch: int, device: str, threads: int = 2, *, pictures: bool = True
    ) -> None:
        self.config, self.fps, self.device, self.pictures = config, fps, device, pictures
        options: dict[str, Any] = {
            "batch_size": batch,
            "num_threads": threads,
            "device_id": torch.cuda.current_device() if device == "gpu" else None,
            # Every clip's randomness comes in as tensors; the graph itself draws nothing.
            "seed": 0,
            "prefetch_queue_depth": 1,
        }
        self.pipeline = (_both if pictures else _sound_alone)(config, fps, device, **options)
        self.pipeline.build()

    def run(self, video: Sequence[np.ndarray], audio: Sequence[np.ndarray], views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """One batch. video: frames uint8 (F, H, W, 3) on a CPU, the MP4 bytes as uint8 (n,) on a GPU; audio: FLAC, Opus,
        Vorbis or WAV bytes, uint8 (n,).

        Returns pictures float32 (B, 3, F, size, size), normalised, and log-mel float32 (B, 1, bands, steps), normalised.
        Raises RuntimeError when a clip does not decode; only `culprit` can be asked after that.
        """
        feed: dict[str, list[Any]] = {
            "video": list(video),
            "start_frame": [np.int32(v.start_frame) for v in views],
            "roi_start": [np.array(v.crop[:2], np.float32) for v in views],
            "roi_end": [np.array([v.crop[0] + v.crop[2], v.crop[1] + v.crop[3]], np.float32) for v in views],
            "mirror": [np.int32(v.mirror) for v in views],
            "brightness": [np.float32(v.brightness) for v in views],
            "contrast": [np.float32(v.contrast) for v in views],
            "saturation": [np.float32(v.saturation) for v in views],
        }
        if self.device != "gpu":
            del feed["start_frame"]
        if not self.pictures:
            feed = {}
        # Frame n is on screen from n / fps on: the sound begins at that sample.
        first = [np.int32(round(v.start_frame / self.fps * self.config.audio_rate)) for v in views]
        feed |= {"audio": list(audio), "start_sample": first, "gain": [np.float32(v.gain) for v in views]}
        for name, values in feed.items():
            self.pipeline.feed_input(name, [np.asarray(v) for v in values])
        *pictures, mel = self.pipeline.run()
        return _to_torch(pictures[0]) if pictures else torch.empty(0), _to_torch(mel).unsqueeze(1)

    def culprit(self, video: Sequence[np.ndarray], audio: Sequence[np.ndarray], views: Sequence[View]) -> tuple[int, str] | None:
        """Place of the first clip that fails by itself, and DALI's reason; a batch fails as a whole and does not say."""
        alone = Graph(self.config, self.fps, 1, self.device, pictures=self.pictures)
        for place, view in enumerate(views):
            try:
                alone.run(video[place : place + 1], audio[place : place + 1], [view])
            except RuntimeError as error:
                text = str(error)
                return place, (text.partition("encountered:")[2] or text).strip().partition("\n")[0]
        return None

    def sounds(self, audio: Sequence[np.ndarray], start_s: Sequence[float]) -> Tensor:
        """Log-mel alone, float32 (B, 1, bands, steps), of sounds from `start_s` seconds on. For a graph without pictures."""
        views = [View(round(s * self.fps), (0.0, 0.0, 1.0, 1.0)) for s in start_s]
        return self.run([], audio, views)[1]


def _to_torch(batch: Any) -> Tensor:
    """A copy: DALI hands its buffer back to the pipeline at the next run."""
    dense = batch.as_tensor()
    return torch.from_dlpack(dense).clone() if hasattr(dense, "__dlpack__") else torch.from_numpy(np.array(dense))


def _scalar(name: str, dtype: Any = types.FLOAT) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=0, batch=True)


@pipeline_def
def _both(config: ViewConfig, fps: float, device: str) -> tuple[Any, Any]:
    return _pictures(config, fps, device), _log_mel(config, fps, device)


@pipeline_def
def _sound_alone(config: ViewConfig, fps: float, device: str) -> Any:
    return _log_mel(config, fps, device)


def _pictures(config: ViewConfig, fps: float, device: str) -> Any:
    if device == "gpu":
        encoded = fn.external_source(name="video", dtype=types.UINT8, ndim=1, batch=True)
        frames = fn.decoders.video(
            encoded,
            device="mixed",
            start_frame=_scalar("start_frame", types.INT32),
            sequence_length=config.frames,
            stride=config.stride(fps),
            pad_mode="edge",
            build_index=False,
        )
    else:
        frames = fn.external_source(name="video", dtype=types.UINT8, layout="FHWC", batch=True)
    roi_start = fn.external_source(name="roi_start", dtype=types.FLOAT, ndim=1, batch=True)
    roi_end = fn.external_source(name="roi_end", dtype=types.FLOAT, ndim=1, batch=True)
    frames = fn.resize(
        frames,
        size=[config.size, config.size],
        roi_start=roi_start,
        roi_end=roi_end,
        roi_relative=True,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    frames = fn.color_twist(
        frames, brightness=_scalar("brightness"), contrast=_scalar("contrast"), saturation=_scalar("saturation")
    )
    return fn.crop_mirror_normalize(
        frames,
        mirror=_scalar("mirror", types.INT32),
        mean=[PICTURE_MEAN] * 3,
        std=[PICTURE_STD] * 3,
        output_layout="CFHW",
        dtype=types.FLOAT,
    )


def _log_mel(config: ViewConfig, fps: float, device: str) -> Any:
    """10 log10 of the mel power spectrum (HTK scale, no normalisation, windows centred, edges reflected): equal to
    torchaudio.transforms.MelSpectrogram(power=2, norm=None, mel_scale="htk")."""
    encoded = fn.external_source(name="audio", dtype=types.UINT8, ndim=1, batch=True)
    sound, _ = fn.decoders.audio(encoded, dtype=types.FLOAT, downmix=True, sample_rate=float(config.audio_rate))
    samples = round(config.span_s(fps) * config.audio_rate)
    first = _scalar("start_sample", types.INT32)
    sound = fn.slice(sound, first, samples, axes=[0], out_of_bounds_policy="pad", fill_values=0.0)
    if device == "gpu":
        sound = sound.gpu()
    power = fn.spectrogram(
        sound * _scalar("gain"),
        nfft=config.n_fft,
        window_length=config.n_fft,
        window_step=config.hop,
        # DALI's own Hann window sits half a sample later: up to 2 dB off where the spectrum has a deep notch.
        window_fn=torch.hann_window(config.n_fft).tolist(),
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
    return (decibels - config.mel_mean_db) / config.mel_std_db
