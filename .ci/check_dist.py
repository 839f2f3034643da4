"""
Check what `python -m build` has made: `python .ci/check_dist.py dist`.

The sdist must hold what git tracks, the wheel all of `mentor_trl/` and nothing else, and the wheel must work from an
environment that has nothing but it and the dependencies. These are borrowed from the environment of this Python, so
that no network is needed.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path


ROOT = Path(__file__).parent.parent
# Names that git tracks and nobody needs who has the sdist
OUTSIDE = (".github/", ".gitignore", ".pre-commit-config.yaml")
MADE = ("PKG-INFO", "setup.cfg", "mentor_trl.egg-info/")
NEED_VLLM = ("ColocateSampler", "PolicyLLM", "ServerSampler")
SCRIPT = f"""
import sys
from importlib import metadata, resources
import mentor_trl

assert mentor_trl.__file__.startswith(sys.prefix), mentor_trl.__file__
assert metadata.version("mentor-trl") == mentor_trl.__version__ == sys.argv[1], metadata.version("mentor-trl")
assert resources.files("mentor_trl.analysis").joinpath("rollout.html").read_text(encoding="utf-8")
for name in set(mentor_trl.__all__) - set({NEED_VLLM}):
    getattr(mentor_trl, name)
"""


def check(folder: Path) -> None:
    """
    Raises:
        `SystemExit`:
            With what is wrong, if anything is.
    """
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    _compare(sdist.name, [name for name in names if not name.startswith(MADE)], tracked())
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    _compare(wheel.name, names, [name for name in tracked() if name.startswith("mentor_trl/")])
    with tempfile.TemporaryDirectory() as place:
        _use(wheel, Path(place))
    print(f"{wheel.name} and {sdist.name} hold what they should; the wheel works from a fresh environment")


def tracked() -> list[str]:
    """Files of the working tree that the sdist should hold."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists() and not name.startswith(OUTSIDE)]


def _compare(archive: str, names: Iterable[str], wanted: Iterable[str]) -> None:
    names, wanted = set(names), set(wanted)
    if names != wanted:
        lines = [f"  missing: {name}" for name in sorted(wanted - names)]
        lines += [f"  not tracked by git: {name}" for name in sorted(names - wanted)]
        sys.exit("\n".join([f"{archive} does not hold what it should (MANIFEST.in, pyproject.toml):", *lines]))


def _use(wheel: Path, place: Path) -> None:
    venv.create(place, with_pip=False)
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    # Of a tree on PYTHONPATH pip would say that the package is installed
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*pip, str(wheel)], check=True, env=alone)
    paths = sysconfig.get_paths(vars={"base": str(place), "platbase": str(place)})
    # Links of editable installations in a folder that a .pth file names are not followed
    Path(paths["purelib"], "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    commands = [[str(python.with_name("mentor-trl")), *words] for words in (["--help"], ["train", "--help"])]
    for command in [*commands, [str(python), "-I", "-c", SCRIPT, wheel.name.split("-")[1]]]:
        subprocess.run(command, check=True, cwd=place, env=alone, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    check(Path(sys.argv[1]))
