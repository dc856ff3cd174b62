"""A batch that failed: kept as tensors with JSON beside them, and run again layer by layer, to the first number not finite.

    RUN/failed/step-00000012/rank-0.safetensors    the batch as that rank had it
    RUN/failed/step-00000012/rank-0.json           step, rank, keys of the clips, why, the checkpoint before it
    RUN/failed/step-00000012/weights.safetensors   the model as it was then, of the first step that failed

No code is read from either.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmacc.train.config import PretrainConfig, from_json
from cmacc.train.contrast.losses import info_nce
from cmacc.train.contrast.objective import Memory
from cmacc.train.loading.reader import Batch
from cmacc.train.networks.compute import autocast
from cmacc.train.networks.encoders import build_encoders
from cmacc.train.running.checkpoint import another_version, checkpoint_folder, find_checkpoint, latest, load, under

log = logging.getLogger(__name__)

FOLDER = "failed"
WEIGHTS = "weights.safetensors"
MOST = 20
"""Steps whose batches are kept: a run that skips thousands must not fill the disk with them."""


def save_failing(
    run: Path, step: int, rank: int, batch: Batch, keys: Sequence[str], why: str, checkpoint: str = ""
) -> Path | None:
    """Write a rank's batch to `run/failed/step-…/` and return that folder; None where there are enough, or no room.

    keys: of its clips, in order. checkpoint: address of the last one before this step, if there is one.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    try:
        folder.parent.mkdir(exist_ok=True)
        if not folder.exists() and len(list(folder.parent.iterdir())) >= MOST:
            return None
        folder.mkdir(exist_ok=True)
        facts = {"step": step, "rank": rank, "keys": list(keys), "why": why, "checkpoint": checkpoint}
        # copies, since safetensors takes no tensors that lie in the same memory, as the loader's may
        contiguous = torch.contiguous_format
        tensors = {k: v.detach().cpu().clone(memory_format=contiguous) for k, v in vars(batch).items() if v is not None}
        save_file(tensors, folder / f".rank-{rank}.part")
        (folder / f".rank-{rank}.part").rename(folder / f"rank-{rank}.safetensors")
        (folder / f"rank-{rank}.json").write_text(json.dumps(facts, indent=2) + "\n")
    except (OSError, SafetensorError) as error:  # the latter is what a full disk is to safetensors
        log.warning("the batch of step %d cannot be kept in %s (%s)", step, folder, error)
        return None
    return folder


def save_weights(run: Path, step: int, tensors: Mapping[str, Tensor]) -> Path | None:
    """Write what the model was when `step` failed, beside its batch; of one step in a run alone, for it may be large.

    tensors: the model's state_dict. None where there is one, or no room.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    if any(folder.parent.glob(f"step-*/{WEIGHTS}")):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, folder / ".w.part"
        )
        return (folder / ".w.part").rename(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        (folder / ".w.part").unlink(missing_ok=True)
        log.warning("the weights of step %d cannot be kept in %s (%s)", step, folder, error)
        return None


@dataclass(frozen=True)
class Failing:
    """One rank's batch. keys: of its clips; why: what was said of it."""

    step: int
    rank: int
    batch: Batch
    keys: list[str]
    why: str


def load_failing(folder: Path) -> list[Failing]:
    """All ranks' batches of a step, by rank. Raises ValueError with one sentence for what is not such a folder."""
    found = []
    try:
        for facts in sorted(folder.glob("rank-*.json"), key=lambda path: int(path.stem.partition("-")[2])):
            said = json.loads(facts.read_text())
            batch = Batch(**load_file(facts.with_suffix(".safetensors")))
            found.append(Failing(int(said["step"]), int(said["rank"]), batch, list(map(str, said["keys"])), str(said["why"])))
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} is not a batch that can be replayed ({reason}); give RUN/failed/step-…") from error
    if not found:
        raise ValueError(f"{folder} holds no batch that failed; give RUN/failed/step-…")
    return found


@dataclass(frozen=True)
class Look:
    """One thing that was looked at. largest: absolute value among those that are finite. clips: whose rows are not finite."""

    where: str
    finite: bool
    largest: float
    clips: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replayed:
    """step: that failed; at: when its weights were so: the same where they were kept, else of a checkpoint, 0 for those it began
    with. looks: in order."""

    step: int
    at: int
    why: str
    looks: list[Look]

    @property
    def first(self) -> Look | None:
        """The first that is not finite."""
        return next((look for look in self.looks if not look.finite), None)

    def sentence(self) -> str:
        weights = f"with the weights of step {self.at}, the batch of step {self.step}"
        if self.first is None and self.at == self.step:
            return f"{weights} is finite throughout here; elsewhere precision, device or the chosen negatives may decide"
        if self.first is None:
            return f"{weights} is finite throughout; they had changed since, so look at optimiser.rate and the gradient norms"
        clips = f" (clips {', '.join(self.first.clips)})" if self.first.clips else ""
        return f"{weights} is first not finite at {self.first.where}{clips}"


def replay(folder: Path, checkpoint: str = "") -> Replayed:
    """Run the batch of `RUN/failed/step-…` through the encoders, losses and gradients.

    checkpoint: whose weights; default: those kept with the batch, or the run's latest, or what it began with. Raises ValueError
    or CheckpointError.
    """
    failing = load_failing(folder)
    run = folder.resolve().parents[1]
    config = _config(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders, memory, at = _weights(config, folder, checkpoint)
    at = failing[0].step if at is None else at
    for module in (*encoders.values(), memory):
        module.to(device).train()
    return Replayed(failing[0].step, at, failing[0].why, list(_looks(failing, encoders, memory, config, device)))


def _config(run: Path) -> PretrainConfig:
    try:
        saved = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} has no config.json that can be read ({error}); give RUN/failed/step-… of a run") from error
    try:
        saved.pop("data", None)
        return from_json(saved)
    except (AttributeError, TypeError, ValueError) as error:
        said = f"{run / 'config.json'} is not what this version writes ({str(error).splitlines()[0].partition(';')[0]})"
        raise ValueError(f"{said}; replay it with the version of the run") from error


def _weights(config: PretrainConfig, folder: Path, checkpoint: str) -> tuple[dict[str, nn.Module], Memory, int | None]:
    """Also the step that they are of; None for those that were kept with the batch."""
    torch.manual_seed(config.seed)
    video, audio = build_encoders(config.encoders)
    encoders: dict[str, nn.Module] = {"video": video, "audio": audio}
    if config.objective.uses_keys:
        encoders["key_video"], encoders["key_audio"] = build_encoders(config.encoders)
        encoders["key_video"].load_state_dict(video.state_dict())
        encoders["key_audio"].load_state_dict(audio.state_dict())
    memory = Memory(config.objective, config.encoders.width)
    at: int | None = None
    if not checkpoint and (folder / WEIGHTS).exists():
        try:
            model = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / WEIGHTS} cannot be read ({error}); give --checkpoint") from error
    else:
        run = folder.resolve().parents[1]
        address = checkpoint or latest(checkpoint_folder(run, config.checkpoint.at))
        if address is None:
            return encoders, memory, 0  # it failed before the first one
        saved = load(find_checkpoint(address))
        model, at = under("model", saved.tensors), saved.step
    try:
        for name, encoder in encoders.items():
            encoder.load_state_dict(under(name, model))
        memory.load_state_dict(under("memory", model))
    except RuntimeError as error:
        if at is None:
            said = f"{folder / WEIGHTS} holds what this version of cmacc does not take"
            raise ValueError(f"{said}; replay it with the version that wrote it") from error
        raise another_version(saved.address, saved.versions, error) from error
    return encoders, memory, at


def _looks(
    failing: Sequence[Failing], encoders: dict[str, nn.Module], memory: Memory, config: PretrainConfig, device: torch.device
) -> Iterator[Look]:
    for name, encoder in encoders.items():
        for key, parameter in encoder.state_dict().items():
            if not parameter.isfinite().all():
                yield _look(f"weight {name}.{key}", parameter)
    outputs: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for part in failing:
        for name, tensor in vars(part.batch).items():
            if tensor is not None and tensor.is_floating_point():
                yield _look(f"rank {part.rank}: input {name}", tensor, part.keys)
        for name, encoder in encoders.items():
            inputs = part.batch.video if name.endswith("video") else part.batch.audio
            watched = _watched(f"rank {part.rank}: {name}", encoder, part.keys)
            with watched as looks, torch.set_grad_enabled("key" not in name), autocast(config.compute, device):
                outputs[name].append(encoder(inputs.to(device)))
            yield from looks
    q_video, q_audio = torch.cat(outputs["video"]), torch.cat(outputs["audio"])
    keys = [key for part in failing for key in part.keys]
    sources = torch.cat([part.batch.sources for part in failing]).to(device)
    total = torch.zeros((), device=device)
    for direction, query, positive, dictionary in (
        ("video_to_audio", q_video, outputs.get("key_audio"), "dictionary_audio"),
        ("audio_to_video", q_audio, outputs.get("key_video"), "dictionary_video"),
    ):
        k = torch.cat(positive) if positive else (q_audio if query is q_video else q_video)
        yield _look(f"similarities {direction}", query @ k.T, keys)
        ring = getattr(memory, dictionary, None)
        negatives, allowed = k[:0], torch.zeros(len(k), 0, dtype=torch.bool, device=device)
        if ring is not None:
            entries = ring.entries
            negatives, allowed = entries.keys, ring.filled & (entries.sources != sources[:, None])
            yield _look(f"keys of {dictionary}", negatives[ring.filled])
        others = sources != sources[:, None] if config.objective.negatives != "dictionary" else None
        parts = info_nce(query, k, negatives, allowed, config.objective.tau, others)
        yield _look(f"loss {direction}", parts.loss)
        total = total + parts.loss
    total.backward()
    for name in ("audio", "video"):
        for key, parameter in reversed(list(encoders[name].named_parameters())):
            if parameter.grad is not None:
                yield _look(f"gradient of {name}.{key}", parameter.grad)


@contextmanager
def _watched(who: str, encoder: nn.Module, keys: Sequence[str]) -> Iterator[list[Look]]:
    """What each layer gives, in the order in which they run."""
    looks: list[Look] = []

    def seen(layer: str) -> Any:
        return lambda module, _, output: looks.append(_look(f"{who}.{layer} ({type(module).__name__})", output, keys))

    hooks = [m.register_forward_hook(seen(name)) for name, m in encoder.named_modules() if not list(m.children())]
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


def _look(where: str, tensor: Tensor, keys: Sequence[str] = ()) -> Look:
    tensor = tensor.detach()
    finite = tensor.isfinite()
    largest = float(tensor.where(finite, 0).abs().max()) if tensor.numel() else 0.0
    clips: tuple[str, ...] = ()
    if keys and tensor.ndim and len(tensor) == len(keys):
        clips = tuple(key for key, well in zip(keys, finite.flatten(1).all(1).tolist(), strict=True) if not well)
    return Look(where, bool(finite.all()), largest, clips)
