"""Images as training wants them: any file read as RGB, decoded once into a cache that all runs share.

Copy this one file to use it (torch, numpy, pillow): build_cache("data", paths) decodes once, append-only and kill-safe;
ImageStore("data", paths) then holds the pixels, memory-mapped or whole on the GPU.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MAX_PIXELS = 89_478_485  # above this Pillow warns of a decompression bomb; photographs stay far below
CHUNK = 128  # rows decoded, written and flushed together while the cache is built
_ORIENTATION = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF tag -> Image.Transpose that undoes it


class DataError(ValueError):
    """Wrong use or input (exit code 2) or a failure (exit code 1), explained in one line."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def require(condition, message: str, exit_code: int = 2) -> None:
    """Raise DataError with the message unless the condition holds."""
    if not condition:
        raise DataError(message, exit_code)


def show_path(path) -> str:
    """Give a path in a form that stays on one line."""
    return str(path) if str(path).isprintable() else repr(str(path))


def seeded_rng(*key: int) -> np.random.Generator:
    """Make a generator that is a pure function of non-negative integers."""
    require(min(key) >= 0, f"seeds must be 0 or more, got {min(key)}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file (made if missing) while others wait; a kill releases it. A full disk is told in one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        found = f"{show_path(error.filename or path)}: {error.strerror or error}; what was complete is kept"
        advice = "free some space or choose another --cache_dir, then repeat the command"
        raise DataError(f"cannot write {found}: {advice}", 1) from None


@contextlib.contextmanager
def _opened(path) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong inside becomes a DataError that names the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged files
        empty = os.path.isfile(path) and not os.path.getsize(path)
        known = {"DecompressionBombError": f"more than {MAX_PIXELS:,} pixels, refused",
                 "UnidentifiedImageError": "the file is empty" if empty else "not an image"}  # fmt: skip
        reason = known.get(type(error).__name__) or getattr(error, "strerror", None) or str(error) or repr(error)
        raise DataError(f"{show_path(path)}: cannot be read: {' '.join(reason.split())}") from None


def _turned(image: Image.Image, tagged: Image.Image) -> Image.Image:
    """Turn an image as the EXIF of `tagged` says; where that is missing or damaged, the pixels are still good."""
    with contextlib.suppress(Exception):
        return image.transpose(_ORIENTATION[tagged.getexif()[0x0112]])
    return image


def read_image(path) -> Image.Image:
    """Read any image as RGB: EXIF orientation applied, transparency on white, 16 bit scaled, first frame, bombs refused."""
    with _opened(path) as source:
        image = source
        if image.mode[0] in "IF":  # 16 and 32 bit grey, which Pillow would clip to white
            grey = np.asarray(image, dtype=np.float32)
            grey = grey * (255 / 65535 if image.mode.startswith("I;16") or grey.max(initial=0) > 255 else 1)
            image = Image.fromarray(np.nan_to_num(grey).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return _turned(image.convert("RGB"), source)


def read_trimap(path, image_path) -> np.ndarray:
    """Read a trimap -> uint8 [H, W]: 0 pet, 1 background, 2 border; turned as the EXIF tag of its image says."""
    name = show_path(path)
    with _opened(image_path) as image, _opened(path) as trimap:
        (w, h), (width, height) = trimap.size, image.size
        # Pillow may give the size of a TIFF as turned.
        sizes = {image.size, image.size[::-1]} if image.format == "TIFF" else {image.size}
        require(trimap.size in sizes, f"{name}: {w} x {h}, but its image is {width} x {height}")
        trimap.load()
        values = np.asarray(_turned(trimap, image))
    found = f"values {values.min()} to {values.max()}" if values.ndim == 2 else f"{values.ndim} dimensions"
    good = values.ndim == 2 and values.dtype != bool and values.min() >= 1 and values.max() <= 3
    require(good, f"{name}: a trimap holds 1 (pet), 2 (background), 3 (border), found {found}")
    return (values - 1).astype(np.uint8)


def trimap_path(image: str) -> str:
    """Give the relative path of an image's trimap."""
    return f"oxford-iiit-pet/annotations/trimaps/{Path(image).stem}.png"


def load_truth(data_root, images: Sequence[str], size: int | tuple[int, int]) -> torch.Tensor:
    """Read original trimaps, each resized once to the nearest pixel -> uint8 [N, h, w], classes 0, 1, 2."""
    require(images, "none of the images can be read; `python prepare.py verify` names the cause")
    h, w = (size, size) if isinstance(size, int) else size
    paths = [(Path(data_root, trimap_path(image)), Path(data_root, image)) for image in images]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        trimaps = pool.map(lambda pair: Image.fromarray(read_trimap(*pair)).resize((w, h), 0), paths)  # 0: nearest
        return torch.from_numpy(np.stack([np.asarray(trimap) for trimap in trimaps]))


class _CacheFiles:
    """One cache on disk: rows in .u8 and, a line for each row, [key, width, height, bytes, mtime_ns, error] in .jsonl."""

    def __init__(self, data_root, kind: str, cache_dir, size: int):
        good = kind in ("image", "trimap") and size >= 1
        require(good, f"no cache of kind {kind!r} and size {size}; kinds are image and trimap, sizes 1 or more")
        root = hashlib.sha256(os.path.abspath(data_root).encode(errors="surrogateescape")).hexdigest()[:12]
        self.root, self.kind, self.size = Path(data_root), kind, size
        self.rows, self.index = (Path(cache_dir, f"{kind}s_{size}_{root}.{end}") for end in ("u8", "jsonl"))
        self.shape = (3 if kind == "image" else 1, size, size)
        self.row_bytes = int(np.prod(self.shape))

    def source(self, key: str) -> Path:
        return self.root / (key if self.kind == "image" else trimap_path(key))

    def stamp(self, key: str) -> list[int]:
        """Size and time of what a row is made from: they tell that it was replaced; a trimap is turned as its photo says."""
        with contextlib.suppress(OSError):
            stats = [os.stat(path) for path in {self.source(key), self.root / key}]
            return [sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats)]
        return [-1, -1]

    def read_index(self) -> tuple[list[list], int]:
        """Read the index up to the first torn line or missing row -> (entries, their length in bytes)."""
        entries, end = [], 0
        with contextlib.suppress(ValueError, FileNotFoundError):
            lines = self.index.read_bytes().splitlines(keepends=True)
            for line in lines[: self.rows.stat().st_size // self.row_bytes]:
                entries.append(json.loads(line[: line.index(b"\n")]))
                end += len(line)
        return entries, end

    def decode(self, key: str) -> tuple[np.ndarray, list]:
        """Decode one source -> (row [C, S, S], index entry); an unreadable one gives a row of zeros and the reason."""
        stamp = self.stamp(key)  # before reading: a file replaced meanwhile will be noticed
        try:
            photo, source = self.kind == "image", self.source(key)
            image = read_image(source) if photo else Image.fromarray(read_trimap(source, self.root / key))
            how = Image.Resampling.BICUBIC if photo else Image.Resampling.NEAREST
            row = np.asarray(image.resize((self.size, self.size), how)).reshape(self.size, self.size, -1)
            return np.ascontiguousarray(row.transpose(2, 0, 1)), [key, *image.size, *stamp, None]
        except DataError as error:
            return np.zeros(self.shape, np.uint8), [key, 0, 0, *stamp, str(error)]


def build_cache(data_root, images: Sequence[str], *, kind: str = "image", cache_dir="cache", cache_size: int = 384,
                workers: int | None = None, progress: Callable | None = None) -> None:  # fmt: skip
    """Decode what the cache lacks, squashed to cache_size, in parallel; any number of processes may call it at once.

    Survives a kill at any moment. progress(description, total) gives a context manager with update(1). Raises DataError
    when the disk is too small, when more than 1 % of the images cannot be read, or any trimap.
    """
    files = _CacheFiles(data_root, kind, cache_dir, cache_size)
    keys = list(dict.fromkeys(images))
    with locked(files.index):
        entries, end = files.read_index()
        latest = {entry[0]: entry for entry in entries}
        # What failed is tried again, for the cause may be gone; it is written again only if it fares differently.
        todo = [k for k in keys if k not in latest or latest[k][5] or latest[k][3:5] != files.stamp(k)]
        needed = files.row_bytes * sum(k not in latest or not latest[k][5] for k in todo)
        free = shutil.disk_usage(cache_dir).free
        found = f"the {kind}s need {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free in {show_path(cache_dir)}"
        require(needed <= free, f"{found}; free some, choose another --cache_dir or a smaller --cache_size", 1)
        if todo:
            with open(files.rows, "ab") as rows, open(files.index, "ab") as index:
                rows.truncate(len(entries) * files.row_bytes)  # cuts off what a kill left half written
                index.truncate(end)
                _append(files, todo, latest, rows, index, workers, progress)
    failed = [latest[k] for k in keys if latest[k][5]]
    if len(failed) > (0.01 * len(keys) if kind == "image" else 0):
        limit = "at most 1 % may be left out" if kind == "image" else "every trimap is needed"
        found = f"{len(failed):,} of {len(keys):,} {kind}s cannot be used ({limit}), first {failed[0][5]}"
        raise DataError(f"{found}; see `python prepare.py verify --data_root {shlex.quote(str(data_root))}`")


def _append(files: _CacheFiles, todo: list[str], latest: dict, rows, index, workers, progress) -> None:
    """Decode in threads (Pillow works without the GIL); rows reach the disk before their index lines."""
    failed, ahead = [], iter(())
    watch = progress(f"decoding {files.kind}s", len(todo)) if progress else contextlib.nullcontext()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool, watch as bar:
        for start in range(0, len(todo) + CHUNK, CHUNK):  # one chunk is decoded while the one before it is written
            decoded, ahead, lines = ahead, pool.map(files.decode, todo[start : start + CHUNK]), b""
            for row, entry in decoded:
                if bar is not None:
                    bar.update(1)
                if not entry[5] or latest.get(entry[0]) != entry:
                    latest[entry[0]] = entry
                    lines += json.dumps(entry).encode() + b"\n"
                    rows.write(row)
                    failed += [entry[5]] if entry[5] else []
            for file, content in ((rows, b""), (index, lines)):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    for reason in failed:  # by the process that decoded them; all others find them in the index
        print(f"left out: {reason}", file=sys.stderr)


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
        if stale := [k for k in keys if k not in latest or entries[latest[k]][3:5] != files.stamp(k)]:
            found = f"{len(stale):,} of {len(keys):,} {kind}s are not in the cache or changed since, first"
            command = f"python prepare.py cache --data_root {shlex.quote(str(data_root))}"
            raise DataError(f"{found} {show_path(stale[0])}; run `{command}`")
        good = [k for k in keys if not entries[latest[k]][5]]
        number = {k: i for i, k in enumerate(good)}
        self.dropped = [k for k in keys if k not in number]
        self.images = tuple(k for k in images if k in number)
        self.rows = np.array([number[k] for k in self.images], np.int64)
        self.sizes = np.array([entries[latest[k]][2:0:-1] for k in good], np.float32).reshape(-1, 2)
        self.size, self.tensor = cache_size, None
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
            return self.tensor[torch.from_numpy(rows).to(self.tensor.device)]
        out = torch.empty(len(rows), *self._map.shape[1:], dtype=torch.uint8, pin_memory=pin)
        np.take(self._map, self._places[rows], axis=0, out=out.numpy(), mode="clip")  # "raise" would copy twice
        return out
