"""Files that are whole or as they were, whatever stops the process or the machine."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]):
    """Lets `write` make a file beside `path`, has it on the disk, and moves it there; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    flush(partial)
    partial.replace(path)


def replace_text(path: Path, text: str):
    """Writes a text file in UTF-8, whole or not at all."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def flush(path: Path):
    """Has the operating system write a file, or the entries of a folder, to the disk now."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what may be written
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
