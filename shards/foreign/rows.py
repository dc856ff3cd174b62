"""Which samples of foreign tars become clips, with which members and facts; and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cmacc.shards.catalog_writer import Entry
from cmacc.shards.clip import AUDIO, KEY, VIDEO, Facts
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.foreign.notes import Noted, Notes
from cmacc.shards.foreign.said import Fields, Said, said

REASONS = {
    "stub": "has neither video nor sound, as where a download failed",
    "member": "lacks a member that the others have",
    "double": "has a member twice",
    "key": "has a key that is not usable: letters, digits, _ and - only, at most 96",
    "duplicate": "has the key of an earlier clip",
    "media": "has a broken medium",
    "json": "has a json member that is not a JSON object",
    "file": "is no file that a reader of WebDataset takes",
    "tar": "is a tar that cannot be used",
}  # fmt: skip
_NEARLY_ALL = 0.9
_MOST_SPLITS = 1000


class Left(Exception):
    """Why a sample is left out: one of REASONS, and what more is known."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def choose_members(
    kinds: Counter[tuple[str, ...]], wanted: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], list[str]]:
    """The members that every clip shall have, media first and json last; and remarks on what nearly was one."""
    usable = ", ".join((*VIDEO, *AUDIO))
    with_media = Counter({names: n for names, n in kinds.items() if set(names) & {*VIDEO, *AUDIO}})
    media = Counter[str]()
    for names, n in with_media.items():
        media.update({m: n for m in names if m in VIDEO or m in AUDIO})
    if not media:
        have = ", ".join(sorted({m for names in kinds for m in names})) or "nothing"
        raise DatasetError(f"the samples of {where} have {have[:200]}, but neither video nor sound; one of {usable} is needed")
    if wanted is not None:
        asked = [m.lower() for m in wanted]
        lacking = [m for m in asked if not any(m in kind for kind in with_media)]
        if lacking or not any(m in media for m in asked) or len(set(asked)) < len(asked):
            why = f"no sample has {lacking[0]}" if lacking else "there must be a medium among them, and none twice"
            raise DatasetError(
                f"members {', '.join(asked)} cannot be had from {where}: {why}; leave the choice out to see it made"
            )
        return _sorted(asked), []
    # a picture matters more than sound, and what more samples have matters more than the rest
    main = max(media, key=lambda m: (media[m], m in VIDEO, -(*VIDEO, *AUDIO).index(m)))
    total = media[main]
    share = Counter[str]()
    for kind, n in with_media.items():
        if main in kind:
            share.update(dict.fromkeys(kind, n))
    chosen = [m for m, n in share.items() if n >= _NEARLY_ALL * total]
    rest = {m: n for m, n in (share | media).items() if m not in chosen and n >= 0.1 * total}
    remarks = [
        f"{n} of {sum(with_media.values())} samples have {m}, which is too few; `--members` makes it a member all the same"
        for m, n in sorted(rest.items())
    ]
    return _sorted(chosen), remarks


def _sorted(names: Sequence[str]) -> tuple[str, ...]:
    order = (*VIDEO, *AUDIO)
    rank = {m: i for i, m in enumerate(order)}
    return tuple(sorted(names, key=lambda m: (m == "json", rank.get(m, len(order)), m)))


class Book:
    """Which samples become clips; what it has seen of keys and splits goes from one tar to the next."""

    def __init__(self, members: tuple[str, ...]) -> None:
        self.members = members
        self._seen: set[int] = set()
        self._splits: set[str] = set()

    def clips(self, notes: Notes) -> tuple[list[Entry], list[tuple[str, str, str]]]:
        """Entries of the catalog, and (key, reason, detail) of what is left out."""
        if notes.error:
            return [], [("", "tar", notes.error)]
        entries: list[Entry] = []
        left = [(name, "file", why) for name, why in notes.odd]
        for sample in notes.samples():
            try:
                entries.append(self._entry(sample))
            except Left as e:
                left.append((sample.path, e.reason, e.detail))
        return entries, left

    def _entry(self, sample: Noted) -> Entry:
        there = sample.extensions
        if not sample.media:
            raise Left("stub", sample.said.get("failed") or f"it has {', '.join(there)}")
        if not KEY.fullmatch(sample.key):
            raise Left("key", repr(sample.key))
        if len(set(there)) < len(there):
            raise Left("double", f"it has {', '.join(there)}")
        lacking = [m for m in self.members if m not in there]
        if lacking:
            raise Left("member", f"it has {', '.join(there)}, and lacks {', '.join(lacking)}")
        if "error" in sample.said and "json" in self.members:
            raise Left("json", sample.said["error"])
        for m in self.members:
            if "error" in sample.media.get(m, {}):
                raise Left("media", f"{m}: {sample.media[m]['error']}")
        if (seen := hash(sample.key)) in self._seen:
            raise Left("duplicate", "the first one is taken" + ("; folders are no part of a key" if "/" in sample.path else ""))
        self._seen.add(seen)
        facts = facts_of(sample, self.members)
        self._splits.add(facts.split)
        if len(self._splits) > _MOST_SPLITS:
            raise DatasetError(
                f"there are more than {_MOST_SPLITS} splits; name the field that holds train or test by --split-field"
            )
        places = [there.index(m) for m in self.members]
        members = tuple(sample.members[i] for i in places)
        return Entry(sample.key, facts, members, tuple(sample.digests[i] for i in places))


def facts_of(sample: Noted, members: tuple[str, ...]) -> Facts:
    """Facts of a clip: of its video and sound as they are, of its source as its maker says. Our own stand where they agree."""
    nan, known = float("nan"), sample.said
    video = next((sample.media[m] for m in members if m in VIDEO), None)
    sound = next((sample.media[m] for m in members if m in AUDIO), video)
    assert sound is not None
    seconds = float((video or sound)["seconds"])
    start_s = float(known.get("start_s", 0.0))
    end_s = known.get("end_s")
    facts = Facts(
        source=known.get("source") or f"file_{sample.key}", start_s=start_s, end_s=start_s + seconds if end_s is None else end_s,
        duration_s=seconds, n_frames=video["frames"] if video else 0, fps=video["fps"] if video else 0.0,
        width=video["width"] if video else 0, height=video["height"] if video else 0,
        keyframes=tuple(video["keyframes"]) if video else (), loudness_db=sound.get("loudness_db", nan),
        motion=(video or {}).get("motion", nan), labels=tuple(known.get("labels", ())), split=known.get("split", ""),
    )  # fmt: skip
    if known.get("ours"):
        ours = facts_from_json(known["ours"].encode())
        seen = ("n_frames", "width", "height", "keyframes")
        if all(getattr(ours, name) == getattr(facts, name) for name in seen) and abs(ours.duration_s - seconds) < 0.1:
            return replace(ours, source=facts.source, labels=facts.labels, split=facts.split)
    return facts


def said_of(dataset: Dataset, row: int) -> Said:
    """What the text members of a foreign clip say, read by the fields it was indexed with. Raises DatasetError, ValueError."""
    there = [m for m in dataset.meta.members if m not in VIDEO and m not in AUDIO]
    asked = dataset.meta.provenance.get("index", {}).get("fields", {})
    return said(str(dataset.keys[row]), dataset.read(row, there), Fields(**asked))


def facts_with_captions(dataset: Dataset, row: int) -> Facts:
    """The catalog's facts of a foreign clip, and its captions, which are in no catalog. Raises like `said_of`."""
    facts = dataset.catalog.facts(slice(row, row + 1))[0]
    end_s = facts.duration_s
    spoken = [(a, end_s if b is None else min(b, end_s), text) for a, b, text in said_of(dataset, row).captions if a < end_s]
    return replace(facts, captions=tuple(spoken))
