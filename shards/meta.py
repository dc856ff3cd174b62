"""`dataset.json`: what a data set is made of, and whether what stands there can be so."""

from __future__ import annotations

import json
import re
import tarfile
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cmacc.shards.errors import DatasetError
from cmacc.shards.profile import Profile

FORMAT = 1
META = "dataset.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.tar")


class Shard(BaseModel):
    """One tar of the data set. clips: how many; bytes: its size; sha256: hex digest of the whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    clips: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _SHARD.fullmatch(name):
            raise ValueError("a shard is a .tar in the data set's own folder")
        return name

    @model_validator(mode="after")
    def _possible(self) -> Shard:
        if self.clips * tarfile.BLOCKSIZE > self.bytes:
            raise ValueError("the shard has more clips than its bytes can hold")
        return self


class Meta(BaseModel):
    """`dataset.json`. members: extensions every clip has; provenance: whatever its maker wants kept (JSON).

    foreign: the shards were made elsewhere and indexed where they lie: their json member, if there is one, is not ours, they
    may hold other things besides, and the profile is None unless all clips are alike and as one of ours could be.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    profile: dict[str, Any] | None
    foreign: bool = False
    members: tuple[str, ...]
    provenance: dict[str, Any] = Field(default_factory=dict)
    shards: list[Shard] = Field(default_factory=list)

    @field_validator("profile")
    @classmethod
    def _known(cls, profile: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if profile is None else Profile.from_json(profile).to_json()

    @field_validator("shards")
    @classmethod
    def _distinct(cls, shards: list[Shard]) -> list[Shard]:
        if len({s.name for s in shards}) < len(shards):
            raise ValueError("a shard is named twice")
        return shards

    @model_validator(mode="after")
    def _complete(self) -> Meta:
        media = [m for m in self.members if m != "json"]
        if not media or len(set(self.members)) < len(self.members) or not (self.foreign or self.members == (*media, "json")):
            raise ValueError("members are one or two media extensions, and json last")
        if self.profile is None and not self.foreign:
            raise ValueError("there is no profile")
        return self

    @property
    def clips(self) -> int:
        """How many, in all shards."""
        return sum(s.clips for s in self.shards)

    def to_bytes(self) -> bytes:
        """The file's content; the same data set always gives the same bytes."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Meta:
        """Raises DatasetError; `where` names the file in it."""
        try:
            found = json.loads(data)
            if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
                raise DatasetError(f"{where} has format {found['format']}, this cmacc reads {FORMAT}: upgrade cmacc")
            return cls.model_validate(found)
        except ValidationError as e:
            first = e.errors()[0]
            place = ".".join(map(str, first["loc"])) or "top"
            raise DatasetError(f"{where} is not usable at {place}: {first['msg']}; restore it from a copy") from e
        except (ValueError, RecursionError) as e:
            raise DatasetError(f"{where} is not JSON ({e}); restore it from a copy") from e
