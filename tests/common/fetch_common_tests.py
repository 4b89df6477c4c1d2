"""Fetches the common tests of the installed transformers, which its wheel leaves out and its source distribution has.

They are kept in `.cache/` of the checkout, one folder a version. Run as a script where tests run without network.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


PACKAGE = "transformers_common_tests"
STAND_INS = Path(__file__).parent / "stand_ins"
CACHE = Path(__file__).parents[2] / ".cache"


class FetchError(RuntimeError):
    """The common tests are not in the cache and could not be downloaded."""


def make_importable():
    """
    Puts the common tests on the path, as the package `transformers_common_tests`, after fetching them if need be.

    Raises:
        FetchError: if they could not be downloaded.
    """
    folder = CACHE / f"transformers-{transformers.__version__}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n")
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            unpack(download(Path(temporary)), Path(temporary) / "ready" / PACKAGE)
            try:
                os.rename(Path(temporary) / "ready", folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    copy_stand_ins(folder / PACKAGE)
    sys.path.insert(0, str(folder))


def download(folder: Path) -> Path:
    """The source distribution of the installed version, as pip finds it."""
    requirement = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        raise FetchError(
            f"The common tests of transformers are missing: pip could not download the source distribution of "
            f"{requirement}. Run `python {Path(__file__).relative_to(CACHE.parent)}` with network access once.\n"
            + done.stderr[-2000:]
        )
    return found[0]


def unpack(archive: Path, package: Path):
    """Takes the test modules that lie directly under `tests/` and makes a package of them."""
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                (package / parts[2]).write_bytes(tar.extractfile(member).read())


def copy_stand_ins(package: Path):
    """Adds our small replacements for the modules that the distribution lacks."""
    for source in STAND_INS.rglob("*.py"):
        target = package / source.relative_to(STAND_INS)
        target.parent.mkdir(exist_ok=True)
        (target.parent / "__init__.py").touch()
        shutil.copyfile(source, target)


if __name__ == "__main__":
    try:
        make_importable()
    except FetchError as error:
        sys.exit(str(error))
    print(f"The common tests of transformers {transformers.__version__} are in {CACHE}.")
