"""Images as training wants them: any file read as RGB, decoded once into a cache that all runs share.

Copy this one file to use it; it needs torch, numpy and pillow:

    build_cache("data", paths)                                                    # decode once, append-only, kill-safe
    store = ImageStore("data", paths, kind="image")                               # memory-mapped, or whole on the GPU
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

MAX_PIXELS = 89_478_485  # above this Pillow warns of a decompression bomb; photographs stay far below
CHUNK = 128  # rows decoded, written and flushed together while the cache is built


class DataError(ValueError):
    """Wrong use or input (exit code 2) or a failure (exit code 1), explained in one line."""

    exit_code = 2

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def show_path(path) -> str:
    """Give a path in a form that stays on one line."""
    return str(path) if str(path).isprintable() else repr(str(path))


def seeded_rng(*key: int) -> np.random.Generator:
    """Make a generator that is a pure function of non-negative integers."""
    if min(key) < 0:
        raise DataError(f"seeds must be 0 or more, got {min(key)}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file (made if missing, with its folder) while others wait; a kill releases it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(f"cannot write to {show_path(path)}: {error.strerror}; choose another --cache_dir", 1) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path) -> Iterator[None]:
    """Turn a full disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(f"no room left while writing {show_path(path)} ({error.strerror}); what was complete is kept: "
                        "free some space or choose another --cache_dir, then repeat the command", 1) from None  # fmt: skip


def trimap_path(image: str) -> str:
    """Give the relative path of an image's trimap."""
    return f"oxford-iiit-pet/annotations/trimaps/{PurePosixPath(image).stem}.png"


# ---------------------------------------------------------------------------------------------------------------------
# Reading images

_ORIENTATION = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF tag -> Image.Transpose that undoes it


@contextlib.contextmanager
def _opened(path) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong inside becomes a DataError that names the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{show_path(path)}: {image.width} x {image.height} pixels, refused above {MAX_PIXELS:,}"
                )
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged files
        known = {"DecompressionBombError": "decompression bomb, refused", "UnidentifiedImageError": "not an image"}
        reason = known.get(type(error).__name__) or getattr(error, "strerror", None) or str(error) or repr(error)
        empty = os.path.isfile(path) and not os.path.getsize(path)
        reason = "the file is empty" if empty else " ".join(reason.split())
        raise DataError(f"{show_path(path)}: cannot be read: {reason}") from None


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return Image.Transpose(_ORIENTATION[image.getexif()[0x0112]])
    except Exception:  # no EXIF, or a damaged one: the pixels are still good
        return None


def read_image(path) -> Image.Image:
    """Read any image as RGB: EXIF orientation applied, transparency on white, 16 bit scaled, first frame, bombs refused."""
    with _opened(path) as image:
        orientation = _orientation(image)
        if image.mode[0] in "IF":  # 16 and 32 bit grey, which Pillow would clip to white
            grey = np.asarray(image, dtype=np.float32)
            grey = grey * (255 / 65535 if image.mode.startswith("I;16") or grey.max(initial=0) > 255 else 1)
            image = Image.fromarray(np.nan_to_num(grey).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        return image if orientation is None else image.transpose(orientation)


def read_trimap(path, image_path=None) -> np.ndarray:
    """Read a trimap -> uint8 [H, W]: 0 pet, 1 background, 2 border; turned as the EXIF tag of its image says."""
    orientation, size = None, None
    if image_path is not None:
        with _opened(image_path) as image:
            orientation, size = _orientation(image), image.size
    with _opened(path) as trimap:
        if size and trimap.size != size:
            raise DataError(
                f"{show_path(path)}: {trimap.width} x {trimap.height}, but its image is {size[0]} x {size[1]}"
            )
        orientation = orientation if size else _orientation(trimap)
        values = np.asarray(trimap if orientation is None else trimap.transpose(orientation))
    if values.ndim != 2 or values.dtype == bool or values.min() < 1 or values.max() > 3:
        found = f"values {values.min()} to {values.max()}" if values.ndim == 2 else f"{values.ndim} dimensions"
        raise DataError(f"{show_path(path)}: a trimap holds 1 (pet), 2 (background), 3 (border), found {found}")
    return (values - 1).astype(np.uint8)


def load_truth(data_root, images: Sequence[str], size: int | tuple[int, int]) -> torch.Tensor:
    """Read original trimaps, each resized once to the nearest pixel -> uint8 [N, h, w], classes 0, 1, 2."""
    h, w = (size, size) if isinstance(size, int) else size

    def read(image: str) -> np.ndarray:
        trimap = read_trimap(Path(data_root, trimap_path(image)), Path(data_root, image))
        return np.asarray(Image.fromarray(trimap).resize((w, h), Image.Resampling.NEAREST))

    truth = np.empty((len(images), h, w), np.uint8)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row, mask in zip(truth, pool.map(read, images), strict=True):
            row[:] = mask
    return torch.from_numpy(truth)


# ---------------------------------------------------------------------------------------------------------------------
# The decoded cache


class _CacheFiles:
    """One cache on disk: rows in .u8 and, a line for each row, [key, width, height, bytes, mtime_ns, error] in .jsonl."""

    def __init__(self, data_root, kind: str, cache_dir, size: int):
        if kind not in ("image", "trimap") or size < 1:
            raise DataError(f"no cache of kind {kind!r} and size {size}; kinds are image and trimap, sizes 1 or more")
        root = hashlib.sha256(os.path.abspath(data_root).encode(errors="surrogateescape")).hexdigest()[:12]
        base = f"{kind}s_{size}_{root}"
        self.root, self.kind, self.size = Path(data_root), kind, size
        self.rows, self.index = Path(cache_dir, f"{base}.u8"), Path(cache_dir, f"{base}.jsonl")
        self.shape = (3 if kind == "image" else 1, size, size)
        self.row_bytes = int(np.prod(self.shape))

    def source(self, key: str) -> Path:
        return self.root / (key if self.kind == "image" else trimap_path(key))

    def stamp(self, key: str) -> list[int]:
        """Size and time of a source file: what tells that it was replaced."""
        try:
            stat = os.stat(self.source(key))
            return [stat.st_size, stat.st_mtime_ns]
        except OSError:
            return [-1, -1]

    def read_index(self) -> tuple[list[list], int]:
        """Read the index up to the first torn line or missing row -> (entries, their length in bytes)."""
        entries: list[list] = []
        end = 0
        rows = self.rows.stat().st_size // self.row_bytes if self.rows.exists() else 0
        with open(self.index, "rb") if self.index.exists() else io.BytesIO() as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if len(entries) == rows or not line.endswith(b"\n") or not isinstance(entry, list) or len(entry) != 6:
                    break
                entries.append(entry)
                end += len(line)
        return entries, end

    def decode(self, key: str) -> tuple[np.ndarray, list]:
        """Decode one source -> (row [C, S, S], index entry); an unreadable one gives a row of zeros and the reason."""
        stamp = self.stamp(key)  # before reading: a file replaced meanwhile will be noticed
        try:
            if self.kind == "image":
                image, how = read_image(self.source(key)), Image.Resampling.BICUBIC
            else:
                image, how = Image.fromarray(read_trimap(self.source(key), self.root / key)), Image.Resampling.NEAREST
            row = np.asarray(image.resize((self.size, self.size), how)).reshape(self.size, self.size, -1)
            return np.ascontiguousarray(row.transpose(2, 0, 1)), [key, *image.size, *stamp, None]
        except DataError as error:
            return np.zeros(self.shape, np.uint8), [key, 0, 0, *stamp, str(error)]


def build_cache(data_root, images: Sequence[str], *, kind: str = "image", cache_dir="cache", cache_size: int = 384,
                workers: int | None = None, progress: Callable | None = None) -> None:  # fmt: skip
    """Decode what the cache lacks, squashed to cache_size, in parallel; any number of processes may call it at once.

    Survives a kill at any moment: rows reach the disk before their index lines, and a torn tail is cut off before the
    next build appends. progress: called as progress(description, total), gives a context manager with update(1).
    Raises DataError when the disk is too small, when more than 1 % of the images cannot be read, or any trimap.
    """
    files = _CacheFiles(data_root, kind, cache_dir, cache_size)
    keys = list(dict.fromkeys(images))
    with locked(files.index):
        entries, end = files.read_index()
        latest = {entry[0]: entry for entry in entries}
        # What failed is tried again, for the cause may be gone; it is written again only if it fares differently.
        todo = [k for k in keys if k not in latest or latest[k][5] or latest[k][3:5] != files.stamp(k)]
        if todo:
            _check_space(files, sum(k not in latest or not latest[k][5] for k in todo))
            with disk_errors(files.rows), open(files.rows, "ab") as rows, open(files.index, "ab") as index:
                rows.truncate(len(entries) * files.row_bytes)
                index.truncate(end)
                _append_rows(files, todo, latest, rows, index, workers, progress)
    _report_failures(files, [latest[k] for k in keys if latest[k][5]], len(keys))


def _append_rows(files: _CacheFiles, todo: list[str], latest: dict, rows, index, workers, progress) -> None:
    chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))  # threads: Pillow works without the GIL
    shown = progress(f"decoding {files.kind}s", len(todo)) if progress else contextlib.nullcontext()
    submitted: deque = deque()
    try:
        with shown as bar:
            for number in range(len(chunks)):
                for ahead in chunks[number + len(submitted) : number + 2]:  # decode on while this chunk is written
                    submitted.append([pool.submit(files.decode, key) for key in ahead])
                lines = []
                for future in submitted.popleft():
                    row, entry = future.result()
                    if bar is not None:
                        bar.update(1)
                    if not entry[5] or latest.get(entry[0]) != entry:
                        latest[entry[0]] = entry
                        lines.append(json.dumps(entry) + "\n")
                        rows.write(row)
                for file, content in ((rows, b""), (index, "".join(lines).encode())):
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
    finally:
        pool.shutdown(cancel_futures=True)


def _check_space(files: _CacheFiles, count: int) -> None:
    needed, free = count * files.row_bytes, shutil.disk_usage(files.rows.parent).free
    if needed > free:
        raise DataError(f"the cache of {count:,} {files.kind}s needs {needed / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} GB are free in {show_path(files.rows.parent)}; free some, choose another --cache_dir "
            "or a smaller --cache_size", 1)  # fmt: skip


def _report_failures(files: _CacheFiles, failed: list[list], total: int) -> None:
    """Name every source that cannot be used; stop where these are too many to leave out."""
    for entry in failed:
        print(f"left out: {entry[5]}", file=sys.stderr)
    if not failed or (files.kind == "image" and len(failed) <= 0.01 * total):
        return
    advice = f"see `python prepare.py verify --data_root {shlex.quote(str(files.root))}`"
    limit = "at most 1 % may be left out" if files.kind == "image" else "every trimap is needed"
    message = f"{len(failed):,} of {total:,} {files.kind}s cannot be used ({limit})"
    raise DataError(f"{message}, first {failed[0][5]}; {advice}")


class ImageStore:
    """The cached rows of a list of images, memory-mapped or (on_device) held as one tensor on `device`.

    `.images`: entries kept, `.dropped`: unreadable ones, `.rows` int64 [N]: entry -> unique image, `.sizes` float32
    [U, 2]: native (height, width). Raises DataError if an image is not in the cache or has changed since it was decoded.
    """

    def __init__(self, data_root, images: Sequence[str], *, kind: str = "image", cache_dir="cache", cache_size: int = 384,
                 device="cpu", on_device: bool = False):  # fmt: skip
        files = _CacheFiles(data_root, kind, cache_dir, cache_size)
        entries, _ = files.read_index()
        latest = {entry[0]: row for row, entry in enumerate(entries)}
        keys = list(dict.fromkeys(images))
        stale = [k for k in keys if k not in latest or entries[latest[k]][3:5] != files.stamp(k)]
        if stale:
            missing = (
                f"{len(stale):,} of {len(keys):,} {kind}s are not in the cache or changed, first {show_path(stale[0])}"
            )
            raise DataError(f"{missing}; run `python prepare.py cache --data_root {shlex.quote(str(data_root))}`")
        good = [k for k in keys if not entries[latest[k]][5]]
        number = {k: i for i, k in enumerate(good)}
        self.dropped = [k for k in keys if k not in number]
        self.images = tuple(k for k in images if k in number)
        self.rows = np.array([number[k] for k in self.images], np.int64)
        self.sizes = np.array([entries[latest[k]][2:0:-1] for k in good], np.float32).reshape(-1, 2)
        self.size, self.device, self.tensor = cache_size, torch.device(device), None
        self._places = np.array([latest[k] for k in good], np.int64)
        self._map = np.memmap(files.rows, np.uint8, "r", shape=(len(entries), *files.shape)) if good else None
        if on_device and good:
            self.tensor = torch.empty(len(good), *files.shape, dtype=torch.uint8, device=device)
            for i in range(0, len(good), CHUNK):
                self.tensor[i : i + CHUNK] = torch.from_numpy(self._map[self._places[i : i + CHUNK]]).to(device)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index, pin: bool = False) -> torch.Tensor:
        """Copy list entries index [n] -> uint8 [n, C, S, S], on the device if the store is there; pin: page-locked."""
        rows = self.rows[np.asarray(index)]
        if self.tensor is not None:
            return self.tensor[torch.from_numpy(rows).to(self.device)]
        out = torch.empty(len(rows), *self._map.shape[1:], dtype=torch.uint8, pin_memory=pin)
        np.take(self._map, self._places[rows], axis=0, out=out.numpy(), mode="clip")  # "raise" would copy twice
        return out
