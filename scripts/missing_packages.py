"""Prints the pinned requirements that this interpreter's environment does not meet, one a line.

    python missing_packages.py [--any-version] requirements.txt ...

With --any-version an installed package counts whatever its version: that is how an interpreter
which brings its own torch is used. There the build tools cmake and ninja count as programs on PATH.
A local version label (2.13.0+cpu) matches its public version, as in pip.
"""

import argparse
import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

_PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)\s*(?:;\s*(?P<marker>.+))?$")
_PROGRAMS = ("cmake", "ninja")
_MARKER = re.compile(r'^python_version\s*(?P<operator>>=|<)\s*"(?P<major>\d+)\.(?P<minor>\d+)"$')


def applies(marker: str | None, version_info=None) -> bool:
    """Whether a marker of the one form that our requirement files use holds for this interpreter."""
    if marker is None:
        return True
    match = _MARKER.match(marker.strip())
    if match is None:
        raise ValueError(f'unsupported marker {marker!r}; expected python_version >= or < "X.Y"')
    ours = tuple(version_info or sys.version_info)[:2]
    other = (int(match["major"]), int(match["minor"]))
    return ours >= other if match["operator"] == ">=" else ours < other


def missing(
    lines, *, any_version: bool, installed=importlib.metadata.version, which=shutil.which
) -> list[str]:
    """The pins among `lines` (name==version) that the environment does not meet."""
    result = []
    for number, line in enumerate(lines, 1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        match = _PIN.match(line)
        if match is None:
            raise ValueError(f"line {number}: {line!r} is not of the form name==version")
        if not applies(match["marker"]):
            continue
        try:
            version = installed(match["name"])
        except importlib.metadata.PackageNotFoundError:
            version = None
        if any_version and match["name"] in _PROGRAMS:
            met = which(match["name"]) is not None
        elif any_version:
            met = version is not None
        else:
            met = version is not None and version.split("+")[0] == match["version"]
        if not met:
            result.append(f"{match['name']}=={match['version']}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--any-version", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    for path in arguments.files:
        for requirement in missing(
            path.read_text().splitlines(), any_version=arguments.any_version
        ):
            print(requirement)


if __name__ == "__main__":
    main()
