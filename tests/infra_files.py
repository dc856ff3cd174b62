"""What the tests of infra/ read alike: the Dockerfile as instructions, YAML files with several documents."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
INFRA = REPOSITORY / "infra"
DOCKERFILE = INFRA / "Dockerfile"


@dataclass
class Stage:
    """A stage of a Dockerfile. base: what it starts from; steps: its instructions, as (word, rest of the line)."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, word: str) -> list[str]:
        return [rest for each, rest in self.steps if each == word]


def stages(dockerfile: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, or by number where they have none."""
    found: dict[str, Stage] = {}
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.M))
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word.upper() == "FROM":
            base, _, name = re.sub(r"--\S+\s+", "", rest).partition(" AS ")
            stage = Stage(name.strip() or str(len(found)), base.strip())
            found[stage.name] = stage
        elif word and found:
            stage.steps.append((word.upper(), rest.strip()))
    return found


def lineage(found: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and those that it is built on, the last one first."""
    line = [found[name]]
    while line[-1].base in found:
        line.append(found[line[-1].base])
    return line


def last(found: dict[str, Stage], name: str, word: str) -> str:
    """What an instruction says in the end for a stage: its own, or that of a stage it is built on. '' when nobody says it."""
    return next((stage.of(word)[-1] for stage in lineage(found, name) if stage.of(word)), "")


def command(found: dict[str, Stage], name: str, word: str) -> list[str]:
    """The words of CMD or HEALTHCHECK, in their JSON form."""
    line = last(found, name, word)
    words: list[str] = json.loads(line[line.index("[") :])
    return words


def run(stage: Stage) -> Iterator[list[str]]:
    """The words of its RUN instructions, without mounts."""
    for line in stage.of("RUN"):
        yield shlex.split(re.sub(r"--mount=\S+\s+", "", line))


def documents(text: str) -> list[Any]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(text) if document is not None]
