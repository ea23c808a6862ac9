# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build the sdist and the wheel of kdbusfs and of kdbus, and try each in an empty environment.

The wheels are tried with the versions in requirements/, the sdists with the lowest that
pyproject.toml allows, to build them too. Each wheel is built from its sdist. Runs in an
environment with requirements/build.txt. Usage: dist.py DIRECTORY-FOR-THE-RESULTS
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
LOCK = ROOT / "requirements" / "build.txt"

# A program of somebody who uses the client and checks types.
PROGRAM = """
import kdbus

def first(path: str) -> bytes:
    with kdbus.Connection(path) as conn, conn.recv() as message:
        return message.payload()

print(kdbus.__version__)
"""


@dataclass(frozen=True)
class Distribution:
    """A distribution, and what has to be there, or not, once it is installed."""

    name: str
    source: Path
    installed: frozenset[str]
    unwanted: frozenset[str] = frozenset()

    @property
    def settings(self) -> dict[str, dict[str, list[str]]]:
        """What its pyproject.toml says."""
        return tomllib.loads((self.source / "pyproject.toml").read_text())


DISTRIBUTIONS = [
    Distribution(
        "kdbusfs", ROOT, frozenset({"kdbusfs", "pyfuse3", "trio", "cffi"}), frozenset({"kdbus"})
    ),
    Distribution(
        "kdbus",
        ROOT / "libkdbus",
        frozenset({"kdbus", "cffi"}),
        frozenset({"kdbusfs", "pyfuse3", "trio"}),
    ),
]


def say(what: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {what}", flush=True)


def run(*command: str | Path, **environment: str) -> str:
    """The output of *command*; if it fails, all that it said and the end of this program."""
    result = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{result.stdout}\nfailed: {' '.join(map(str, command))}")
    return result.stdout


def pinned() -> dict[str, str]:
    """The versions in requirements/, by name."""
    text = "".join(path.read_text() for path in LOCK.parent.glob("*.txt"))
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def lowest(dist: Distribution) -> dict[str, str]:
    """The lowest versions with which *dist* is to be built and to work."""
    settings = dist.settings
    bounds = [*settings["build-system"]["requires"], *settings["project"]["dependencies"]]
    return dict(bound.split(">=") for bound in bounds)


def build(dist: Distribution, results: Path) -> tuple[Path, Path]:
    """The sdist of *dist*, and the wheel that was built from it."""
    say(f"building {dist.name}")
    constraints = ("--dependency-constraints-txt", LOCK)
    run(sys.executable, "-m", "build", "--outdir", results, *constraints, dist.source)
    version = run(sys.executable, "-c", "from kdbusfs.version import VERSION; print(VERSION)")
    sdist = results / f"{dist.name}-{version.strip()}.tar.gz"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (wheel,) = results.glob(f"{dist.name}-{version.strip()}-{tag}-*.whl")
    return sdist, wheel


def install(artifact: Path, versions: dict[str, str], where: Path) -> Path:
    """An environment with *artifact* and what it needs, nothing else; its interpreter."""
    venv.create(where / "venv", symlinks=True)
    python = where / "venv" / "bin" / "python"
    constraints = where / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    constrained = ("--constraint", constraints, "--build-constraint", constraints)
    run(*PIP, "--python", python, "install", *constrained, artifact)
    run(*PIP, "--python", python, "check")
    return python


def try_out(dist: Distribution, python: Path, elsewhere: Path) -> None:
    """See that *dist* works, and that there is no more beside it than it needs."""
    listed = json.loads(run(*PIP, "--python", python, "list", "--format=json"))
    versions = {package["name"].lower(): package["version"] for package in listed}
    say("  " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    assert dist.installed <= versions.keys(), versions
    assert not dist.unwanted & versions.keys(), versions
    if dist.name == "kdbusfs":
        version = run(python.with_name("kdbusfs"), "--version")
        run(python, "-I", "-c", "from kdbusfs.bus import bus; assert bus.__file__.endswith('.so')")
        serve(python.with_name("kdbusfs"), elsewhere / "domain")
    else:
        program = elsewhere / "program.py"
        program.write_text(PROGRAM)
        version = run(python, "-I", program)
        run(sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull,
            "--python-executable", python, program)  # fmt: skip
    assert versions[dist.name] in version, version


def serve(kdbusfs: Path, directory: Path) -> None:
    """Mount a domain with *kdbusfs*, look into it, unmount it."""
    if os.geteuid() != 0:
        say("  NOT TRIED without root: a mount")
        return
    directory.mkdir()
    run(kdbusfs, directory)
    try:
        assert os.listdir(directory) == ["control"]
    finally:
        run("umount", directory)


def main() -> None:
    results = Path(sys.argv[1]).resolve()
    for dist in DISTRIBUTIONS:
        sdist, wheel = build(dist, results)
        for artifact, versions in ((wheel, pinned()), (sdist, pinned() | lowest(dist))):
            say(f"installing {artifact.name}")
            with tempfile.TemporaryDirectory() as work:
                try_out(dist, install(artifact, versions, Path(work)), Path(work))
    say("sdists and wheels work")


START = time.monotonic()
if __name__ == "__main__":
    os.chdir(ROOT)
    main()
