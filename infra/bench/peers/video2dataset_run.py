"""Runs video2dataset for the ingest bench, in the environment of video2dataset.txt: one JSON job on stdin, JSON on the last line.

{"list": JSON file of rows with `url` and `clips`, "out": folder, "tmp": folder, "height": pixels, "fps": frames/s,
 "audio_rate": Hz, "videos": how many, "workers": processes}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from video2dataset import video2dataset
from video2dataset.subsamplers import AudioRateSubsampler, FrameSubsampler, ResolutionSubsampler

# Two faults of version 1.3.0 are mended here, for this run alone; the processes that it spawns import this file too.
# It asks the first subsampler of each kind for `encode_formats`, which these two lack.
ResolutionSubsampler.encode_formats = {"video": "mp4"}
AudioRateSubsampler.encode_formats = {"audio": "flac"}


def _leave_streams_alone(kind: type) -> None:
    """It goes over a dictionary while these subsamplers take a key out of it: give them a copy."""
    inner = kind.__call__
    kind.__call__ = lambda self, streams, metadata=None: inner(self, dict(streams), metadata)


_leave_streams_alone(FrameSubsampler)
_leave_streams_alone(AudioRateSubsampler)


def main() -> None:
    job = json.load(sys.stdin)
    config = {
        "subsampling": {
            "ClippingSubsampler": {"args": {"precision": "exact"}},
            "ResolutionSubsampler": {"args": {"height": job["height"], "resize_mode": "scale", "encode_format": "mp4"}},
            "FrameSubsampler": {"args": {"frame_rate": job["fps"], "encode_format": "mp4"}},
            "AudioRateSubsampler": {"args": {"sample_rate": job["audio_rate"], "encode_format": "flac", "n_audio_channels": 1}},
        },
        "reading": {
            "yt_args": {"download_size": 360, "download_audio_rate": 44100, "yt_metadata_args": None},
            "timeout": 60,
            "sampler": None,
        },
        "storage": {
            "number_sample_per_shard": -(-job["videos"] // (2 * job["workers"])),
            "oom_shard_count": 5,
            "captions_are_subtitles": False,
        },
        "distribution": {
            "processes_count": job["workers"],
            "thread_count": 1,
            "subjob_size": 1000,
            "distributor": "multiprocessing",
        },
    }
    video2dataset(
        url_list=job["list"],
        output_folder=job["out"],
        output_format="webdataset",
        input_format="json",
        encode_formats={"video": "mp4", "audio": "wav"},
        url_col="url",
        clip_col="clips",
        tmp_dir=job["tmp"],
        config=config,
    )
    stats = [json.loads(path.read_text()) for path in Path(job["out"]).glob("*_stats.json")]
    seconds = max(s["end_time"] for s in stats) - min(s["start_time"] for s in stats)
    print(json.dumps({"videos": sum(s["successes"] for s in stats), "seconds": seconds}))


if __name__ == "__main__":
    main()
