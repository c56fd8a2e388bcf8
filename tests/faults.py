"""Faults that disks, people and other processes cause: what damages a file, and what forbids to write one."""

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

NOBODY = 65534


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """Make a temporary folder that every user may read, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Act as a user who owns nothing, for root is refused nothing."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def forbid_writing(folder: Path) -> None:
    """Take the right to write from a folder and all that is in it."""
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)


def allow_writing(folder: Path) -> None:
    """Give the rights back."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def allow_everyone(folder: Path) -> None:
    """Let every user read and write what is in a folder."""
    folder.chmod(0o777)
    for path in folder.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)


# ----------------------------------------------------------------------------------------------------------------------
# What happens to a file


def flip_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut_off(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def zero_page(path: Path, rng: random.Random) -> None:
    """Zero a page, as a file system may leave it after a crash; of small files a smaller one."""
    content = bytearray(path.read_bytes())
    size = max(1, min(4096, len(content) // 4))
    start = rng.randrange(len(content) // size + 1) * size
    content[start : start + size] = bytes(len(content[start : start + size]))
    path.write_bytes(content)


def write_noise(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) + 1)
    noise = rng.randbytes(rng.randint(1, 64))
    content[start : start + len(noise)] = noise
    path.write_bytes(content)


def repeat_part(path: Path, rng: random.Random) -> None:
    """Write a part twice, as a copy that was interrupted and continued wrongly."""
    content = path.read_bytes()
    place = rng.randrange(len(content) + 1)
    path.write_bytes(content[:place] + content[rng.randrange(place + 1) :])


def drop_line(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    if lines:
        lines.pop(rng.randrange(len(lines)))
    path.write_bytes(b"".join(lines))


def write_other_json(path: Path, rng: random.Random) -> None:
    """Write valid JSON that is nothing of ours."""
    path.write_text(rng.choice(["{}", "[]", "null", "0", '""', "[[]]", '{"experiment": []}', "1e999", "NaN"]))


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def become_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def become_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def take_rights(path: Path, rng: random.Random) -> None:
    path.chmod(0)


def set_clock(path: Path, rng: random.Random) -> None:
    """Give a file a time that a clock set back or ahead would give it."""
    later = path.stat().st_mtime_ns + rng.choice([-1, 1]) * rng.randrange(1, 10**17)
    os.utime(path, ns=(later, later))


DAMAGES = {
    "bit": flip_bit,
    "cut": cut_off,
    "zeroed page": zero_page,
    "noise": write_noise,
    "repeated part": repeat_part,
    "lost line": drop_line,
    "other JSON": write_other_json,
    "emptied": empty,
    "deleted": delete,
    "a folder": become_folder,
    "a pipe": become_pipe,
    "rights taken": take_rights,
    "clock": set_clock,
}
KEEP_TIME = ("bit", "cut", "zeroed page", "noise")  # what a disk does leaves the time of a file as it was


class Snapshot:
    """The files below a folder as they are, to be brought back after each fault."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = {path: (path.read_bytes(), path.stat()) for path in folder.rglob("*") if path.is_file()}
        self.folders = {path for path in folder.rglob("*") if path.is_dir()}

    def restore(self) -> None:
        """Bring back what was changed, and remove what was not there."""
        for path in sorted(self.folder.rglob("*"), reverse=True):  # what lies in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                if path not in self.folders:
                    path.rmdir()
            elif path not in self.files:
                path.unlink()
        for path, (content, before) in self.files.items():
            if path.exists() and same_stat(path.stat(), before):
                continue
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            path.chmod(before.st_mode)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def force(self, path: Path) -> None:
        """Bring back one file, whatever its time says."""
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        self.restore()


def same_stat(now: os.stat_result, before: os.stat_result) -> bool:
    """Check whether a file has the size, time and rights that it had."""
    names = ("st_size", "st_mtime_ns", "st_mode")
    return all(getattr(now, name) == getattr(before, name) for name in names)
