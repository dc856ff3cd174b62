"""FFmpeg's shared libraries for torchcodec, which brings none: those of PyAV's wheel, under the names that are looked for.

So both decode with the very same build. Debian 12's FFmpeg 5.1 in its place made no difference that could be measured.
"""

from __future__ import annotations

import re
from importlib.metadata import files
from pathlib import Path

_NAME = re.compile(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]+(\.so\.\d+)[\d.]*")


def link_ffmpeg(folder: Path) -> str:
    """Make the links in `folder`; what LD_LIBRARY_PATH has to be, in a process that is yet to start."""
    folder.mkdir()
    homes = set()
    for file in files("av") or ():
        if found := _NAME.fullmatch(file.name):
            path = Path(file.locate()).resolve()
            (folder / f"{found[1]}{found[2]}").symlink_to(path)
            homes.add(str(path.parent))
    if not homes:
        raise RuntimeError("the installed PyAV brings no FFmpeg libraries; install it from its wheel")
    return ":".join([str(folder), *sorted(homes)])
