"""Images as training wants them: any file read as RGB, decoded once into a cache that all runs share.

To use it elsewhere, copy this one file (it needs torch, numpy and Pillow). build_cache("data", paths) decodes every image
once; the cache only grows and survives a kill. ImageStore("data", paths) then gives the pixels, from a memory map or from a
tensor on the GPU.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shlex
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

MAX_PIXELS = 89_478_485  # above this Pillow warns of a decompression bomb; photographs stay far below
MAX_UNREADABLE = 0.01  # share of the images that may be left out
CHUNK = 128  # rows decoded, written and flushed together while the cache is built

ORIENTATION_TAG = 0x0112  # in the EXIF data
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # value of the orientation tag -> what turns the image upright


class DataError(ValueError):
    """Wrong use or input (exit code 2) or a failure (exit code 1), explained in one line."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def require(condition: object, message: str, exit_code: int = 2) -> None:
    """Raise DataError with the message unless the condition holds."""
    if not condition:
        raise DataError(message, exit_code)


def show_path(path: str | Path) -> str:
    """Return a path as text that stays on one line, quoted if it holds unprintable characters."""
    text = str(path)
    if text.isprintable():
        return text
    return repr(text)


def seeded_rng(*key: int) -> np.random.Generator:
    """Make a generator that depends on its key of non-negative integers alone."""
    require(min(key) >= 0, f"seeds must be 0 or more, got {min(key)}")
    sequence = np.random.SeedSequence(key)
    return np.random.Generator(np.random.Philox(sequence))


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without locks answer
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if missing; the system releases it after a kill.

    An OSError inside, such as a full disk, becomes a DataError with advice.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise DataError(_explain_write(error, path), 1) from None


def _explain_write(error: OSError, path: Path) -> str:
    """Say why a file of the cache cannot be written, and what to do."""
    name = show_path(path if error.filename is None else error.filename)
    reason = error if error.strerror is None else error.strerror
    if error.errno in NO_LOCKS:
        return f"cannot lock {name}: {reason}; choose a --cache_dir on a file system that has locks (flock)"
    if error.errno in NOT_ALLOWED:
        owner = "what is missing in it cannot be added"
        return f"cannot write {name}: {reason}; {owner}: choose another --cache_dir, or ask its owner to complete it"
    advice = "free some space or choose another --cache_dir, then repeat the command"
    return f"cannot write {name}: {reason}; what was complete is kept: {advice}"


# ----------------------------------------------------------------------------------------------------------------------
# Reading images and trimaps


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image; any error while it is open becomes a DataError that names the file."""
    try:
        _require_file(path)
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged files
        reason = " ".join(_reason(error, path).split())
        raise DataError(f"{show_path(path)}: cannot be read: {reason}") from None


def _require_file(path: str | Path) -> None:
    """Raise DataError for what is no file: reading from a pipe or device would never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise DataError(f"{show_path(path)}: cannot be read: it is a pipe or device, not a file")


def _reason(error: Exception, path: str | Path) -> str:
    """Say why an image could not be read."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels, refused"
    if isinstance(error, Image.UnidentifiedImageError):
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            return "the file is empty"
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error):
        return str(error)
    return repr(error)


def _turn_upright(image: Image.Image, tagged: Image.Image) -> Image.Image:
    """Turn an image as the EXIF orientation of `tagged` says; a missing or damaged tag leaves it as it is."""
    try:
        method = UPRIGHT.get(tagged.getexif().get(ORIENTATION_TAG))
    except Exception:  # damaged EXIF data; the pixels are still good
        return image
    if method is None:
        return image
    return image.transpose(method)


def _scale_grey(image: Image.Image) -> Image.Image:
    """Convert 16 and 32 bit grey to 8 bit, where Pillow would clip to white; fractions up to 1 are shares of white."""
    grey = np.asarray(image, dtype=np.float32)
    highest = grey.max(initial=0, where=np.isfinite(grey))
    if image.mode.startswith("I;16") or highest > 255:
        grey = grey * (255 / 65535)
    elif image.mode == "F" and highest <= 1:
        grey = grey * 255
    grey = np.nan_to_num(grey).clip(0, 255).round()
    return Image.fromarray(grey.astype(np.uint8))


def _place_on_white(image: Image.Image) -> Image.Image:
    """Composite a transparent image over white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)


def read_image(path: str | Path) -> Image.Image:
    """Read the first frame of any image file as RGB.

    The EXIF orientation is applied, transparency is placed on white, 16 bit grey is scaled to 8 bit. Raises DataError for
    files that cannot be read and for more than MAX_PIXELS.
    """
    with _opened(path) as source:
        image = source
        if image.mode.startswith(("I", "F")):
            image = _scale_grey(image)
        if image.has_transparency_data:
            image = _place_on_white(image)
        return _turn_upright(image.convert("RGB"), source)


def read_trimap(path: str | Path, image_path: str | Path) -> np.ndarray:
    """Read a trimap -> uint8 [H, W]: 0 pet, 1 background, 2 border, turned as the EXIF tag of its image says.

    Raises DataError for other values, and for a size that differs from the image's.
    """
    with _opened(image_path) as image, _opened(path) as trimap:
        _check_trimap_size(trimap, image, path)
        trimap.load()
        values = np.asarray(_turn_upright(trimap, image))
    expected = f"{show_path(path)}: a trimap holds 1 (pet), 2 (background), 3 (border)"
    require(values.ndim == 2, f"{expected}, found {values.ndim} dimensions")
    lowest = values.min()
    highest = values.max()
    good = values.dtype != bool and lowest >= 1 and highest <= 3
    require(good, f"{expected}, found values {lowest} to {highest}")
    return (values - 1).astype(np.uint8)


def _check_trimap_size(trimap: Image.Image, image: Image.Image, path: str | Path) -> None:
    """Raise DataError unless a trimap has the size of its image."""
    allowed = [image.size]
    if image.format == "TIFF":  # Pillow may report the size after turning
        allowed.append((image.height, image.width))
    message = f"{trimap.width} x {trimap.height}, but its image is {image.width} x {image.height}"
    require(trimap.size in allowed, f"{show_path(path)}: {message}")


def can_open(path: str | Path) -> bool:
    """Tell whether a file begins as an image does; its pixels are not read."""
    try:
        with _opened(path):
            return True
    except DataError:
        return False


def trimap_path(image: str) -> str:
    """Return the path of an image's trimap, relative to the data root."""
    return f"oxford-iiit-pet/annotations/trimaps/{Path(image).stem}.png"


TRIMAP_RESIZE = ("nearest", "bilinear")


def load_truth(
    data_root: str | Path, images: Sequence[str], size: int | tuple[int, int], resize: str = "nearest"
) -> torch.Tensor:
    """Read the trimaps of images at a size -> uint8 [N, h, w], classes 0, 1, 2.

    size: side of a square, or (height, width). resize: "nearest", or "bilinear" as in the study's code: the file's values
    are interpolated and rounded, so that background appears between pet and border.
    """
    require(images, "none of the images can be read; `python prepare.py verify` names the cause")
    require(resize in TRIMAP_RESIZE, f"trimaps are resized by {' or '.join(TRIMAP_RESIZE)}, got {resize!r}")
    if isinstance(size, int):
        size = (size, size)
    shrink = resize_nearest
    if resize == "bilinear":
        shrink = resize_bilinear

    def read(image: str) -> np.ndarray:
        trimap = read_trimap(Path(data_root, trimap_path(image)), Path(data_root, image))
        return shrink(trimap, size)

    with ThreadPoolExecutor(num_cores()) as pool:
        trimaps = list(pool.map(read, images))
    return torch.from_numpy(np.stack(trimaps))


def resize_nearest(trimap: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize classes uint8 [H, W] to (h, w) by nearest neighbour."""
    height, width = size
    return np.asarray(Image.fromarray(trimap).resize((width, height), Image.Resampling.NEAREST))


def resize_bilinear(trimap: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize classes uint8 [H, W] to (h, w) as if they were brightness, and round to the nearest class."""
    height, width = size
    values = Image.fromarray(trimap.astype(np.float32))
    resized = np.asarray(values.resize((width, height), Image.Resampling.BILINEAR))
    return np.floor(resized + 0.5).clip(0, 2).astype(np.uint8)


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


# ----------------------------------------------------------------------------------------------------------------------
# The cache on disk


class Stamp(NamedTuple):
    """Size and time of the files that a row is made from; a change of either means that they were replaced."""

    num_bytes: int
    mtime_ns: int


MISSING = Stamp(-1, -1)
CACHE_FORMAT = b"2 "  # part of the files' names: caches of an earlier format are neither read nor changed


class CacheEntry(NamedTuple):
    """One line of a cache's index: what the row of the same number was made from.

    On disk a JSON list after its own checksum, so that no change of a bit goes unnoticed.
    """

    key: str  # path of the image, relative to the data root
    width: int  # of the original, in pixels; 0 if it cannot be read
    height: int
    num_bytes: int
    mtime_ns: int
    error: str | None  # why the source cannot be read; its row holds zeros
    row_checksum: int  # CRC-32 of the row

    def line(self) -> bytes:
        """Write the entry as a line of the index."""
        content = json.dumps(self).encode()
        return b"%08x %s\n" % (zlib.crc32(content), content)

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.num_bytes, self.mtime_ns)


class _CacheFiles:
    """One cache on disk: rows of pixels in a .u8 file, and a CacheEntry for each row in a .jsonl file."""

    def __init__(self, data_root: str | Path, kind: str, cache_dir: str | Path, size: int):
        good = kind in ("image", "trimap") and size >= 1
        require(good, f"no cache of kind {kind!r} and size {size}; kinds are image and trimap, sizes 1 or more")
        location = os.path.abspath(data_root).encode(errors="surrogateescape")
        digest = hashlib.sha256(CACHE_FORMAT + location).hexdigest()[:12]
        channels = 3 if kind == "image" else 1
        self.root = Path(data_root)
        self.kind = kind
        self.size = size
        self.rows = Path(cache_dir, f"{kind}s_{size}_{digest}.u8")
        self.index = Path(cache_dir, f"{kind}s_{size}_{digest}.jsonl")
        self.shape = (channels, size, size)
        self.row_bytes = channels * size * size

    def sources(self, key: str) -> list[Path]:
        """List the files that a row is made from: an image, or a trimap and the image that says how it is turned."""
        image = self.root / key
        if self.kind == "image":
            return [image]
        return [self.root / trimap_path(key), image]

    def stamp(self, key: str) -> Stamp:
        """Add up the sizes and times of a row's source files; MISSING if one of them is."""
        num_bytes = 0
        mtime_ns = 0
        for path in self.sources(key):
            try:
                source = os.stat(path)
            except (OSError, ValueError):  # a name with NUL is no name of a file
                return MISSING
            num_bytes += source.st_size
            mtime_ns += source.st_mtime_ns
        return Stamp(num_bytes, mtime_ns)

    def read_index(self) -> tuple[list[CacheEntry], int]:
        """Read the index up to the first torn line or missing row -> (entries, their length in bytes)."""
        try:
            lines = self.index.read_bytes().splitlines(keepends=True)
            num_rows = self.rows.stat().st_size // self.row_bytes
        except FileNotFoundError:
            return [], 0
        entries = []
        length = 0
        for line in lines[:num_rows]:
            entry = _parse_entry(line)
            if entry is None:
                break
            entries.append(entry)
            length += len(line)
        return entries, length

    def decode(self, key: str) -> tuple[np.ndarray, CacheEntry]:
        """Decode one source -> (row [C, S, S], entry); an unreadable one gives zeros and an entry with the reason."""
        stamp = self.stamp(key)  # before reading, so that a file replaced meanwhile will be noticed
        try:
            image = self._read(key)
        except DataError as error:
            row = np.zeros(self.shape, np.uint8)
            return row, CacheEntry(key, 0, 0, *stamp, str(error), zlib.crc32(row))
        row = self._make_row(image)
        return row, CacheEntry(key, image.width, image.height, *stamp, None, zlib.crc32(row))

    def _read(self, key: str) -> Image.Image:
        sources = self.sources(key)
        if self.kind == "image":
            return read_image(*sources)
        return Image.fromarray(read_trimap(*sources))

    def _make_row(self, image: Image.Image) -> np.ndarray:
        """Resize an image to a square, without regard to its aspect ratio -> uint8 [C, S, S]."""
        resampling = Image.Resampling.BICUBIC if self.kind == "image" else Image.Resampling.NEAREST
        resized = image.resize((self.size, self.size), resampling)
        pixels = np.asarray(resized).reshape(self.size, self.size, -1)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _parse_entry(line: bytes) -> CacheEntry | None:
    """Parse a line of the index; None if it is torn or damaged."""
    checksum, _, content = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content):
        return None
    return CacheEntry(*json.loads(content))


# ----------------------------------------------------------------------------------------------------------------------
# Building the cache


def build_cache(
    data_root: str | Path,
    images: Sequence[str],
    *,
    kind: str = "image",
    cache_dir: str | Path = "cache",
    cache_size: int = 384,
    workers: int | None = None,
    progress: Callable | None = None,
) -> None:
    """Decode in parallel what the cache lacks, each image resized to a square of cache_size pixels.

    It survives a kill at any moment, and any number of processes may call it at once. kind: "image" or "trimap".
    progress(description, total) gives a context manager with update(1). Raises DataError when the disk is too small, when
    more than 1 % of the images cannot be read, or any trimap.
    """
    files = _CacheFiles(data_root, kind, cache_dir, cache_size)
    keys = list(dict.fromkeys(images))
    entries, _ = files.read_index()
    latest = {entry.key: entry for entry in entries}
    if _find_outdated(files, keys, latest):  # what is complete may be someone else's: it is read without a lock
        with locked(files.index):
            entries, index_bytes = files.read_index()
            latest = {entry.key: entry for entry in entries}
            todo = _find_outdated(files, keys, latest)
            _require_space(files, todo, latest)
            if todo:  # nothing, if another process has decoded it meanwhile
                with open(files.rows, "ab") as rows, open(files.index, "ab") as index:
                    rows.truncate(len(entries) * files.row_bytes)  # cut off what a kill left half written
                    index.truncate(index_bytes)
                    writer = _CacheWriter(rows, index, latest)
                    _decode_and_write(files, todo, writer, workers, progress)
    _require_readable(files, [latest[key] for key in keys])


def _find_outdated(files: _CacheFiles, keys: list[str], latest: dict[str, CacheEntry]) -> list[str]:
    """List the keys whose rows have to be decoded."""
    return [key for key in keys if _is_outdated(key, latest.get(key), files)]


def _is_outdated(key: str, entry: CacheEntry | None, files: _CacheFiles) -> bool:
    """Say whether a row has to be decoded: it is missing, its source changed, or the cause of its failure is gone."""
    if entry is None or entry.stamp != files.stamp(key):
        return True
    if entry.error is None:
        return False
    _, again = files.decode(key)
    return again != entry


def _require_space(files: _CacheFiles, todo: list[str], latest: dict[str, CacheEntry]) -> None:
    """Raise DataError unless the disk has room for the rows that will be added."""
    cache_dir = files.rows.parent
    needed = 0
    for key in todo:
        failed_before = key in latest and latest[key].error is not None
        if not failed_before:
            needed += files.row_bytes
    free = shutil.disk_usage(cache_dir).free
    state = f"the {files.kind}s need {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free in {show_path(cache_dir)}"
    require(needed <= free, f"{state}; free some, choose another --cache_dir or a smaller --cache_size", 1)


def _require_readable(files: _CacheFiles, entries: list[CacheEntry]) -> None:
    """Raise DataError if too many sources of a list cannot be read."""
    errors = [entry.error for entry in entries if entry.error is not None]
    if files.kind == "image":
        allowed = MAX_UNREADABLE * len(entries)
        limit = "at most 1 % may be left out"
    else:
        allowed = 0
        limit = "every trimap is needed"
    if len(errors) > allowed:
        problem = f"{len(errors):,} of {len(entries):,} {files.kind}s cannot be used ({limit}), first {errors[0]}"
        raise DataError(f"{problem}; {_advise(files.root)}")


def _advise(root: Path) -> str:
    """Say what to do about unreadable files: prepare.py names those of the data sets that it knows, not of other folders."""
    if any((root / name).is_dir() for name in ("coco", "oxford-iiit-pet")):
        return f"see `python prepare.py verify --data_root {shlex.quote(str(root))}`"
    return f"repair or delete what cannot be read in {show_path(root)}"


class _CacheWriter:
    """Append rows and their entries to an open cache."""

    def __init__(self, rows: BinaryIO, index: BinaryIO, latest: dict[str, CacheEntry]):
        self.rows = rows
        self.index = index
        self.latest = latest  # key -> its last entry, kept up to date
        self.pending = []  # entries whose rows may not have reached the disk yet
        self.notes = []  # what a person must know

    def add(self, row: np.ndarray, entry: CacheEntry) -> None:
        """Append a row; one that failed before is written again only if it fares differently."""
        before = self.latest.get(entry.key)
        if entry.error is not None:
            if before == entry:
                return
            self.notes.append(f"left out: {entry.error}")
        elif before is not None and before.error is None and before.row_checksum != entry.row_checksum:
            self.notes.append(f"changed: {show_path(entry.key)} has other pixels than when it was decoded before")
        self.latest[entry.key] = entry
        self.rows.write(row)
        self.pending.append(entry)

    def flush(self) -> None:
        """Bring everything to the disk, rows before their entries, so that no entry lacks its row after a kill."""
        _flush_to_disk(self.rows)
        for entry in self.pending:
            self.index.write(entry.line())
        _flush_to_disk(self.index)
        self.pending = []


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _decode_and_write(
    files: _CacheFiles, todo: list[str], writer: _CacheWriter, workers: int | None, progress: Callable | None
) -> None:
    """Decode in threads, which Pillow lets run at once, and write chunk by chunk."""
    watch = contextlib.nullcontext()
    if progress is not None:
        watch = progress(f"decoding {files.kind}s", len(todo))
    if workers is None:
        workers = num_cores()
    with ThreadPoolExecutor(workers) as pool, watch as bar:
        for chunk in _decode_ahead(pool, files, todo):
            for row, entry in chunk:
                if bar is not None:
                    bar.update(1)
                writer.add(row, entry)
            writer.flush()
    for note in writer.notes:  # only in the process that decoded; the others read errors from the index
        print(note, file=sys.stderr)


def _decode_ahead(pool: ThreadPoolExecutor, files: _CacheFiles, todo: list[str]) -> Iterator[Iterable]:
    """Yield chunks of (row, entry); while the caller writes one, the next is being decoded."""
    current = pool.map(files.decode, todo[:CHUNK])
    for start in range(CHUNK, len(todo), CHUNK):
        following = pool.map(files.decode, todo[start : start + CHUNK])
        yield current
        current = following
    yield current


# ----------------------------------------------------------------------------------------------------------------------
# Reading the cache


class ImageStore:
    """The cached rows of a list of images, in a memory map or (on_device) in one tensor on `device`.

    `.images`: the entries kept. `.dropped`: the unreadable ones. `.rows` int64 [N]: entry -> unique image. `.sizes` float32
    [U, 2]: original (height, width) of the unique images. `.size`: side of the rows in pixels. `.tensor` uint8
    [U, C, S, S] on the device, or None. `.checksum`: of the pixels and their names. Raises DataError if an
    image is not in the cache or has changed since, or if a row is damaged.
    """

    def __init__(
        self,
        data_root: str | Path,
        images: Sequence[str],
        *,
        kind: str = "image",
        cache_dir: str | Path = "cache",
        cache_size: int = 384,
        device: str | torch.device = "cpu",
        on_device: bool = False,
    ):
        files = _CacheFiles(data_root, kind, cache_dir, cache_size)
        entries, _ = files.read_index()
        latest = {entry.key: row for row, entry in enumerate(entries)}
        keys = list(dict.fromkeys(images))
        _require_current(files, keys, entries, latest)

        good = [key for key in keys if entries[latest[key]].error is None]
        number = {key: i for i, key in enumerate(good)}
        self.images = tuple(key for key in images if key in number)
        self.dropped = [key for key in keys if key not in number]
        self.rows = np.array([number[key] for key in self.images], np.int64)
        self.size = cache_size

        cache_rows = [latest[key] for key in good]
        self.checksum = _hash_pixels([entries[row] for row in cache_rows])
        sizes = [(entries[row].height, entries[row].width) for row in cache_rows]
        self.sizes = np.array(sizes, np.float32).reshape(-1, 2)
        self._cache_rows = np.array(cache_rows, np.int64)  # unique image -> row of the cache

        self._map = None
        self.tensor = None
        if good:
            self._map = np.memmap(files.rows, np.uint8, "r", shape=(len(entries), *files.shape))
            self._require_intact(files, [entries[row] for row in cache_rows])
            if on_device:
                self.tensor = self._copy_to(device)

    def _require_intact(self, files: _CacheFiles, entries: list[CacheEntry]) -> None:
        """Raise DataError if a row is not what was written: a disk, or a person, has changed it."""

        def find_damaged(start: int) -> list[str]:
            part = slice(start, start + CHUNK)
            pairs = zip(self._cache_rows[part], entries[part], strict=True)
            return [entry.key for row, entry in pairs if zlib.crc32(self._map[row]) != entry.row_checksum]

        with ThreadPoolExecutor(num_cores()) as pool:  # a few GB/s; what is read here lies in memory afterwards
            damaged = list(itertools.chain.from_iterable(pool.map(find_damaged, range(0, len(entries), CHUNK))))
        if damaged:
            problem = f"{len(damaged):,} of {len(entries):,} rows are damaged, first that of {show_path(damaged[0])}"
            raise DataError(f"{show_path(files.rows)}: {problem}; delete this file and repeat the command", 1)

    def _copy_to(self, device: str | torch.device) -> torch.Tensor:
        """Copy all rows -> uint8 [U, C, S, S] on the device, in chunks to spare the host's memory."""
        count = len(self._cache_rows)
        tensor = torch.empty(count, *self._map.shape[1:], dtype=torch.uint8, device=device)
        for start in range(0, count, CHUNK):
            chunk = self._cache_rows[start : start + CHUNK]
            tensor[start : start + CHUNK] = torch.from_numpy(self._map[chunk]).to(device)
        return tensor

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index: Sequence[int] | np.ndarray, pin: bool = False) -> torch.Tensor:
        """Copy the list's entries `index` [n] -> uint8 [n, C, S, S], on the device if the store is there.

        pin: into page-locked memory, from which a GPU copies faster.
        """
        rows = self.rows[np.asarray(index)]
        if self.tensor is not None:
            return self.tensor[torch.from_numpy(rows).to(self.tensor.device)]
        out = torch.empty(len(rows), *self._map.shape[1:], dtype=torch.uint8, pin_memory=pin)
        # mode="raise" would copy twice.
        np.take(self._map, self._cache_rows[rows], axis=0, out=out.numpy(), mode="clip")
        return out


def _hash_pixels(entries: list[CacheEntry]) -> str:
    """Compute what tells the pixels of one list from others, by the checksums of their rows."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.key, entry.width, entry.height, entry.row_checksum]).encode())
    return digest.hexdigest()


def _require_current(files: _CacheFiles, keys: list[str], entries: list[CacheEntry], latest: dict[str, int]) -> None:
    """Raise DataError if an image is not in the cache or has changed since it was decoded."""
    stale = []
    for key in keys:
        if key not in latest or entries[latest[key]].stamp != files.stamp(key):
            stale.append(key)
    if stale:
        problem = f"{len(stale):,} of {len(keys):,} {files.kind}s are not in the cache or changed since, first"
        command = f"python prepare.py cache --data_root {shlex.quote(str(files.root))}"
        raise DataError(f"{problem} {show_path(stale[0])}; run `{command}`")
