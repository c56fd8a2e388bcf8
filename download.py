"""Download COCO 2017 and Oxford-IIIT Pet: resumed, retried, checked by MD5, extracted only into the target folder.

An archive grows as `<data_root>/archives/<name>.part` and is renamed when its MD5 agrees. A folder is extracted under a
temporary name next to its place and moved there when complete. So a partial archive or folder is never taken for a complete
one, wherever the process is killed. Imports nothing from this collection; `prepare.py download` is its command line.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

COCO = "http://images.cocodataset.org/"
PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"

CHUNK = 1 << 20  # bytes read at a time
RETRIES = 6  # after lost connections in a row
PROGRESS_MADE = 8 * CHUNK  # more bytes than ever before: the count of lost connections starts again
TIMEOUT = 30  # seconds without an answer

# Faults of the local disk, which another connection does not mend.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# What zipfile and tarfile raise for damaged archives.
EXTRACTION_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    RuntimeError,
    IsADirectoryError,
    NotADirectoryError,
)

ProgressFactory = Callable[[str, int, str, int], AbstractContextManager]  # (description, total, unit, initial)


class Archive(NamedTuple):
    """A published archive; its folder `top` becomes <data_root>/<parent>/<top>."""

    dataset: str  # coco or pets
    url: str
    size: int  # bytes
    md5: str
    parent: str
    top: str
    limit: int  # bytes that it unpacks to at most
    files: int  # files that match `pattern` in the complete folder
    pattern: str

    @property
    def name(self) -> str:
        """Return the file name of the archive."""
        return self.url.rsplit("/", 1)[1]


ARCHIVES = (
    Archive(
        dataset="coco",
        url=COCO + "annotations/annotations_trainval2017.zip",
        size=252_907_541,
        md5="f4bbac642086de4f52a3fdda2de5fa2c",
        parent="coco",
        top="annotations",
        limit=900_000_000,
        files=2,
        pattern="instances_*2017.json",
    ),
    Archive(
        dataset="coco",
        url=COCO + "zips/val2017.zip",
        size=815_585_330,
        md5="442b8da7639aecaf257c1dceb8ba8c80",
        parent="coco",
        top="val2017",
        limit=900_000_000,
        files=5_000,
        pattern="*.jpg",
    ),
    Archive(
        dataset="coco",
        url=COCO + "zips/train2017.zip",
        size=19_336_861_798,
        md5="cced6f7f71b7629ddf16f17bbcfab6b2",
        parent="coco",
        top="train2017",
        limit=20_500_000_000,
        files=118_287,
        pattern="*.jpg",
    ),
    Archive(
        dataset="pets",
        url=PETS + "annotations.tar.gz",
        size=19_173_078,
        md5="95a8c909bbe2e81eed6a22bccdf3f68f",
        parent="oxford-iiit-pet",
        top="annotations",
        limit=200_000_000,
        files=7_349,
        pattern="[!.]*.png",
    ),
    Archive(
        dataset="pets",
        url=PETS + "images.tar.gz",
        size=791_918_971,
        md5="5c4f3ee8e5d25df40f4fd59a7f44e54c",
        parent="oxford-iiit-pet",
        top="images",
        limit=1_000_000_000,
        files=7_390,
        pattern="*.jpg",
    ),
)


class DownloadError(ValueError):
    """A download or extraction that failed; the message is one line with what to do."""

    exit_code = 1


# -- What is there, and whether the rest fits


def target_folder(archive: Archive, data_root: Path) -> Path:
    """Return the folder that an archive becomes."""
    return data_root / archive.parent / archive.top


def work_folder(archive: Archive, data_root: Path) -> Path:
    """Return the folder of an unfinished extraction: while it exists, the target is not complete."""
    return data_root / archive.parent / f".{archive.top}.extracting"


def is_complete(archive: Archive, data_root: Path) -> bool:
    """Tell whether an archive's folder has all its files and no extraction into it is unfinished."""
    files = list(target_folder(archive, data_root).rglob(archive.pattern))
    return len(files) >= archive.files and not work_folder(archive, data_root).exists()


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(archives: Sequence[Archive], data_root: Path, keep: bool) -> None:
    """Check that the disk holds the archives (one at a time unless kept) and what they unpack to.

    Raises DownloadError if it does not.
    """
    store = data_root / "archives"
    downloaded = 0
    unpacked = 0
    sizes = [0]
    for archive in archives:
        sizes.append(archive.size)
        unpacked += archive.limit
        for file in store.glob(archive.name + "*"):  # complete or partial
            downloaded += file.stat().st_size
    packed = sum(sizes) if keep else max(sizes)
    needed = packed + unpacked - downloaded
    free = free_space(data_root)
    if free < needed:
        advice = f"{free / 1e9:.1f} GB are free: make room or name another --data_root"
        raise DownloadError(f"{data_root} needs {needed / 1e9:.1f} GB for archives and files, {advice}")


# -- Download


def request(url: str, start: int) -> http.client.HTTPResponse:
    """Ask for a file from byte `start` on; raise DownloadError where another try cannot help."""
    headers = {"Accept-Encoding": "identity"}
    if start > 0:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:  # busy: try again
            raise
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}: check --mirror") from None


def first_byte(response: http.client.HTTPResponse, start: int) -> int:
    """Return the first byte that an answer holds: 0 where the server does not support ranges."""
    if response.status == http.client.PARTIAL_CONTENT:
        return start
    return 0


def describe_mismatch(response: http.client.HTTPResponse, start: int, size: int) -> str | None:
    """Say how an answer differs from bytes `start` to `size` of a file; None if it does not."""
    first = first_byte(response, start)
    if "html" in response.headers.get("Content-Type", ""):
        return "sends a web page"
    length = response.headers.get("Content-Length", "")
    if length.isdigit():
        total = first + int(length)
        if total != size:
            return f"offers {total:,} bytes"
    if first > 0:
        span = response.headers.get("Content-Range", "")
        if not span.startswith(f"bytes {start}-"):
            return f"answers the range from byte {start} with {span!r}"
    return None


def receive(file: BinaryIO, url: str, size: int, bar: Any) -> None:
    """Append to a file what it lacks of `size` bytes, over one connection that may end early.

    Starts again from the first byte where the server does not support ranges.
    """
    start = file.tell()
    with request(url, start) as response:
        mismatch = describe_mismatch(response, start, size)
        if mismatch:
            raise DownloadError(f"{url}: the server {mismatch}, not the archive of {size:,} bytes: check --mirror")
        if first_byte(response, start) != start:
            bar.update(-start)
            file.seek(0)
            file.truncate()
        chunk = response.read(CHUNK)
        while chunk:
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > size:  # more than was published: its MD5 will not agree
                break
            chunk = response.read(CHUNK)


def receive_all(file: BinaryIO, url: str, size: int, bar: Any, sleep: Callable[[float], None]) -> None:
    """Append to a file until it has `size` bytes, over as many connections as it takes.

    A lost connection is tried again after 1, 2, 4 ... seconds, RETRIES times without PROGRESS_MADE. Raises DownloadError
    after that, and OSError for faults of the disk.
    """
    failures = 0
    best = file.tell()
    while file.tell() < size:
        reason = "the connection was cut"
        try:
            receive(file, url, size, bar)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in DISK_FAULTS:
                raise
            reason = str(error) or type(error).__name__
        received = file.tell()
        if received >= size:
            return
        failures += 1
        if received >= best + PROGRESS_MADE:
            failures = 1
            best = received
        if failures > RETRIES:
            raise DownloadError(f"{url}: {reason}; {received:,} bytes are kept: run again to continue")
        sleep(min(60, 2 ** (failures - 1)))


def compute_md5(file: BinaryIO) -> str:
    """Return the MD5 of an open file in hexadecimal digits."""
    digest = hashlib.md5()
    file.seek(0)
    chunk = file.read(CHUNK)
    while chunk:
        digest.update(chunk)
        chunk = file.read(CHUNK)
    return digest.hexdigest()


def fetch(archive: Archive, path: Path, url: str, progress: ProgressFactory, sleep: Callable[[float], None]) -> None:
    """Download an archive to `path` by way of `path.part`, continuing what is there, and check its MD5.

    Raises DownloadError where the network fails for good, or where the MD5 differs; the file is then removed.
    """
    source = Path(f"{path}.part")
    if path.exists():  # kept by an earlier call
        source = path
    with source.open("a+b") as file:
        with progress(f"download {path.name}", archive.size, "B", file.tell()) as bar:
            if source != path:
                receive_all(file, url, archive.size, bar, sleep)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
        md5 = compute_md5(file)
    if md5 != archive.md5:
        source.unlink()
        found = f"{size:,} bytes with MD5 {md5}, not {archive.size:,} with {archive.md5}"
        raise DownloadError(f"{url}: {found}: damaged, removed; run again to download it anew")
    source.rename(path)


# -- Extraction


class Member(NamedTuple):
    """A member of a zip or tar archive."""

    entry: zipfile.ZipInfo | tarfile.TarInfo
    name: str
    size: int  # bytes
    is_plain: bool  # a file or folder: no link, no device


def zip_members(file: zipfile.ZipFile) -> Iterator[Member]:
    """List the members of a zip."""
    for entry in file.infolist():
        # A zip made on Unix holds each file's mode: its highest bits are 8 for a file, 4 for a folder, 0 if unknown.
        kind = entry.external_attr >> 28
        yield Member(entry, entry.filename, entry.file_size, kind in (0, 4, 8))


def tar_members(file: tarfile.TarFile) -> Iterator[Member]:
    """List the members of a tar."""
    for entry in file:
        yield Member(entry, entry.name, entry.size, entry.isreg() or entry.isdir())


def stays_inside(name: str) -> bool:
    """Tell whether a member's name leads to a place below the folder it is extracted into."""
    parts = PurePosixPath(name).parts
    has_drive = len(parts) > 0 and ":" in parts[0]
    return not (name.startswith("/") or ".." in parts or "\\" in name or has_drive)


def check_members(members: Iterable[Member], path: Path, limit: int) -> Iterator[Member]:
    """Pass on the members of the archive at `path`.

    Raises DownloadError at the first one that is unsafe, or with which they exceed `limit` bytes.
    """
    total = 0
    for member in members:
        total += member.size
        if not (member.is_plain and stays_inside(member.name)):
            raise DownloadError(
                f"{path}: {member.name!r} is a link, device or outside its folder: nothing was extracted"
            )
        if total > limit:
            raise DownloadError(f"{path} unpacks to more than {limit:,} bytes: it is not the published archive")
        yield member


@contextmanager
def open_archive(raw: BinaryIO, name: str) -> Iterator[tuple[zipfile.ZipFile | tarfile.TarFile, Iterator[Member]]]:
    """Open a .zip or .tar.gz for extraction, with its members in order."""
    if name.endswith(".zip"):
        with zipfile.ZipFile(raw) as file:
            yield file, zip_members(file)
    else:
        with tarfile.open(fileobj=raw, mode="r|gz") as file:
            if hasattr(tarfile, "data_filter"):  # not in the first releases of Python 3.10 and 3.11
                file.extraction_filter = tarfile.data_filter
            yield file, tar_members(file)


def unpack(path: Path, folder: Path, limit: int, bar: Any) -> None:
    """Extract a .zip or .tar.gz into an empty folder.

    Raises DownloadError for links, devices and names outside the folder, and for more than `limit` bytes.
    """
    done = 0
    with path.open("rb") as raw, open_archive(raw, path.name) as (file, members):
        for member in check_members(members, path, limit):
            file.extract(member.entry, folder)
            bar.update(raw.tell() - done)
            done = raw.tell()


def move_files(source: Path, target: Path) -> None:
    """Move all files below a folder to the same places below another one; files of other names stay there."""
    for folder, _, names in os.walk(source):
        place = target / Path(folder).relative_to(source)
        place.mkdir(exist_ok=True)
        for name in names:
            shutil.move(Path(folder) / name, place / name)


def extract(archive: Archive, path: Path, data_root: Path, progress: ProgressFactory) -> None:
    """Extract an archive next to its place and move its files there, also into a folder that lacks some.

    Raises DownloadError where it is damaged, unsafe or incomplete.
    """
    work = work_folder(archive, data_root)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with progress(f"extract {path.name}", path.stat().st_size, "B", 0) as bar:
            unpack(path, work, archive.limit, bar)
    except DownloadError:
        shutil.rmtree(work)
        raise
    except EXTRACTION_ERRORS as error:
        shutil.rmtree(work)
        raise DownloadError(f"{path} cannot be extracted ({error}): delete it and run again") from None
    move_files(work / archive.top, target_folder(archive, data_root))
    shutil.rmtree(work)
    if not is_complete(archive, data_root):
        raise DownloadError(f"{path} holds fewer than {archive.files:,} files {archive.pattern}: it is not the archive")


# -- Everything


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; raise DownloadError where another process holds it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{folder} is in use by another download: wait for it or stop it") from None
        yield
    finally:
        os.close(lock)


def install(
    data_root: str | Path,
    datasets: Sequence[str],
    mirror: str | None,
    keep: bool,
    progress: ProgressFactory,
    archives: Sequence[Archive] = ARCHIVES,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Download and extract what the data sets ("coco", "pets") lack under data_root.

    Complete folders are left alone. mirror: address of a folder with the archives, None for the publishers'; keep: keep
    the archives; progress: factory of context managers with update(n). Raises DownloadError.
    """
    data_root = Path(data_root)
    chosen = [archive for archive in archives if archive.dataset in datasets]
    missing = [archive for archive in chosen if not is_complete(archive, data_root)]
    check_space(missing, data_root, keep)
    store = data_root / "archives"
    store.mkdir(parents=True, exist_ok=True)
    with lock_folder(store):
        for archive in chosen:
            if archive in missing:
                path = store / archive.name
                url = f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url
                fetch(archive, path, url, progress, sleep)
                extract(archive, path, data_root, progress)
                if not keep:
                    path.unlink()
            say(f"{target_folder(archive, data_root)} is complete")
        if not any(store.iterdir()):
            store.rmdir()
