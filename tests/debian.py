# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a Debian machine has on which tools/packages.sh has installed all it may install.

That is those packages and what they depend on, and what every Debian has. Recommended packages
aren't among it, nor is anything else that happens to be on this machine.

Run as a program it fills a directory with links to the commands of these packages: with
that as PATH nothing else is found. Usage: debian.py DIRECTORY
"""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [Path("/usr/sbin"), Path("/usr/bin"), Path("/sbin"), Path("/bin")]


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def listed() -> list[str]:
    """The packages that tools/packages.sh may install."""
    return output(ROOT / "tools" / "packages.sh", "--list").split()


@cache
def dependencies() -> dict[str, set[str]]:
    """For each installed package, and each name that it provides, the names it depends on."""
    found: dict[str, set[str]] = {}
    form = "${Package}\t${Provides}\t${Pre-Depends}, ${Depends}\n"
    for line in output("dpkg-query", "--show", f"--showformat={form}").splitlines():
        package, provides, needs = line.split("\t")
        names = set(re.findall(r"(?:^|[,|])\s*([\w.+-]+)", needs))
        found[package] = found.get(package, set()) | names
        for name in re.findall(r"(?:^|,)\s*([\w.+-]+)", provides):
            found.setdefault(name, set()).add(package)
    return found


def on_every_machine() -> list[str]:
    """The packages without which there is no Debian."""
    form = "${Package} ${Essential} ${Priority}\n"
    lines = output("dpkg-query", "--show", f"--showformat={form}").splitlines()
    return [line.split()[0] for line in lines if " yes " in line or line.endswith(" required")]


@cache
def available() -> frozenset[str]:
    """The packages that are there: what is listed, what every machine has, what these need."""
    found: set[str] = set()
    ahead = [*listed(), *on_every_machine()]
    while ahead:
        package = ahead.pop()
        if package in dependencies() and package not in found:
            found.add(package)
            ahead += dependencies()[package]
    return frozenset(found)


def owners(paths: set[Path]) -> dict[Path, set[str]]:
    """For each of the files *paths* the packages that brought it, none if no package did."""
    # Before /usr was merged with / packages named /lib and /bin, and some still do.
    names = {name: path for path in paths for name in (path, Path("/", *path.parts[2:]))}
    found: dict[Path, set[str]] = {path: set() for path in paths}
    command = ["dpkg-query", "--search", *names]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    for line in told.splitlines():
        packages, _, name = line.partition(": ")
        if not line.startswith("diversion ") and Path(name) in names:
            found[names[Path(name)]] |= {re.sub(":.*", "", one) for one in packages.split(", ")}
    return found


def files() -> set[Path]:
    """All files of the packages that are there."""
    lines = output("dpkg-query", "--listfiles", *sorted(available() & installed())).splitlines()
    return {Path(line).resolve() for line in lines if "bin/" in line or "/lib/" in line}


def installed() -> set[str]:
    return set(output("dpkg-query", "--show", "--showformat=${Package}\n").split())


def link_commands(directory: Path) -> None:
    """Fill *directory* with links to all commands of the packages that are there."""
    theirs = files()
    for place in COMMANDS:
        for command in place.iterdir():
            if command.resolve() in theirs and not (directory / command.name).is_symlink():
                (directory / command.name).symlink_to(command)


if __name__ == "__main__":
    link_commands(Path(sys.argv[1]))
