"""Download COCO 2017 and Oxford-IIIT Pet: resumed, retried, checked by MD5, extracted without leaving the target folder.

An archive grows as `<data_root>/archives/<name>.part` and gets its name when its MD5 agrees; a folder is extracted beside
its place and moved there when whole. So nothing half-written is ever taken for whole, wherever a download is killed.
Imports nothing from this collection; `prepare.py download` is its command line.
"""

import fcntl
import fnmatch
import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CHUNK, RETRIES = 1 << 20, 6
FLAKY = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class DownloadError(ValueError):
    """A download or extraction that failed; the message is one line with what to do."""

    exit_code = 1


@dataclass(frozen=True)
class Archive:
    """One published archive: its folder `top` becomes `<data_root>/<parent>/<top>`."""

    dataset: str
    url: str
    size: int  # bytes
    md5: str
    parent: str
    top: str
    limit: int  # bytes it unpacks to, at most
    files: int  # that match `pattern` below the folder when it is whole, at least
    pattern: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


COCO, PETS = "http://images.cocodataset.org/", "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
ARCHIVES = (
    Archive("coco", COCO + "annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c",
            "coco", "annotations", 900_000_000, 2, "instances_*2017.json"),
    Archive("coco", COCO + "zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80",
            "coco", "val2017", 900_000_000, 5_000, "*.jpg"),
    Archive("coco", COCO + "zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2",
            "coco", "train2017", 20_500_000_000, 118_287, "*.jpg"),
    Archive("pets", PETS + "annotations.tar.gz", 19_173_078, "95a8c909bbe2e81eed6a22bccdf3f68f",
            "oxford-iiit-pet", "annotations", 200_000_000, 7_349, "[!.]*.png"),
    Archive("pets", PETS + "images.tar.gz", 791_918_971, "5c4f3ee8e5d25df40f4fd59a7f44e54c",
            "oxford-iiit-pet", "images", 1_000_000_000, 7_390, "*.jpg"),
)  # fmt: skip


def is_complete(archive: Archive, data_root: Path) -> bool:
    """Tell whether an archive's folder is whole: its files are there and no unfinished extraction is beside it."""
    home = data_root / archive.parent
    count = sum(len(fnmatch.filter(names, archive.pattern)) for _, _, names in os.walk(home / archive.top))
    return count >= archive.files and not (home / f".{archive.top}.extracting").exists()


def check_space(archives, data_root: Path, keep: bool) -> None:
    """Raise DownloadError unless the disk holds the archives (one at a time unless kept) and what they unpack to."""
    held = needed = 0
    for archive in archives:
        path = data_root / "archives" / archive.name
        there = sum(p.stat().st_size for p in (path, path.with_name(path.name + ".part")) if p.exists())
        needed = max(needed, held + archive.size - there + archive.limit)
        held += archive.limit + (archive.size * keep - there)
    free = shutil.disk_usage(next(folder for folder in (data_root, *data_root.parents) if folder.exists())).free
    if free < needed:
        advice = f"{free / 1e9:.1f} GB are free: make room or name another --data_root"
        raise DownloadError(f"{data_root} needs {needed / 1e9:.1f} GB for archives and files, {advice}")


def open_url(url: str, start: int, archive: Archive, timeout: float):
    """Ask for an archive from byte `start` on: (response, first byte sent). What no retry can mend is a DownloadError."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:
            raise
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}: check --mirror") from None
    first, total, problem = "0", response.headers.get("Content-Length") or "", None
    if response.status == 206:  # Content-Range: bytes first-last/total
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        first = span.partition("-")[0]
    if "html" in response.headers.get("Content-Type", ""):
        problem = "sends a web page"
    elif total.isdigit() and int(total) != archive.size:
        problem = f"offers {int(total):,} bytes"
    elif first not in ("0", str(start)):
        problem = f"answers the range from byte {start} with one from {first!r}"
    if problem:
        response.close()
        raise DownloadError(f"{url}: the server {problem}, not the archive of {archive.size:,} bytes: check --mirror")
    return response, int(first)


def fetch(archive: Archive, path: Path, url: str, progress, sleep=time.sleep, timeout: float = 30) -> None:
    """Download an archive to `path` by way of `path.part`, continuing what is there, and check its MD5.

    `progress`: factory (desc, total, unit, initial) of a context manager with update(n). A lost connection is tried again
    after 1, 2, 4 … seconds, at most RETRIES times without 8 MB more than ever before.
    """
    part, digest, size = path.with_name(path.name + ".part"), hashlib.md5(), 0
    source = path if path.exists() else part
    with source.open("a+b") as file:
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
        failures, best = 0, size
        with progress(f"download {archive.name}", archive.size, "B", size) as bar:
            while size < archive.size and source == part:
                reason = "the connection was cut"
                try:
                    response, first = open_url(url, size, archive, timeout)
                    with response:
                        if first != size:  # no support for ranges: all over again
                            file.truncate(0)
                            bar.update(-size)
                            digest, size = hashlib.md5(), 0
                        while size <= archive.size and (chunk := response.read(CHUNK)):
                            file.write(chunk)
                            digest.update(chunk)
                            size += len(chunk)
                            bar.update(len(chunk))
                except FLAKY as error:
                    reason = str(error) or type(error).__name__
                if size < archive.size:
                    failures, best = (1, size) if size >= best + 8 * CHUNK else (failures + 1, best)
                    if failures > RETRIES:
                        raise DownloadError(f"{url}: {reason}; {size:,} bytes are kept: run again to continue")
                    sleep(min(60, 2 ** (failures - 1)))
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != archive.md5:
        source.unlink()
        found = f"{size:,} bytes with MD5 {digest.hexdigest()}, not {archive.size:,} with {archive.md5}"
        raise DownloadError(f"{url}: {found}: damaged, removed; run again to download it anew")
    source.rename(path)


def unpack(path: Path, folder: Path, limit: int, bar) -> None:
    """Extract a .zip or .tar.gz into an empty folder: plain files and folders below it, `limit` bytes at most."""
    total = 0

    def check(name, plain, size):
        nonlocal total
        total, parts = total + size, PurePosixPath(name).parts
        if not plain or name.startswith("/") or ".." in parts or "\\" in name or ":" in "".join(parts[:1]):
            raise DownloadError(f"{path}: {name!r} is a link, a device or outside its folder: nothing was extracted")
        if total > limit:
            raise DownloadError(f"{path} unpacks to more than {limit:,} bytes: it is not the published archive")

    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as file:
            for member in file.infolist():
                kind = stat.S_IFMT(member.external_attr >> 16)
                check(member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR), member.file_size)
            for member in file.infolist():
                file.extract(member, folder)
                bar.update(member.compress_size)
        return
    with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|gz") as file:
        for member in file:
            done = raw.tell()
            check(member.name, member.isreg() or member.isdir(), member.size)
            file.extract(member, folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
            bar.update(raw.tell() - done)


def extract(archive: Archive, path: Path, data_root: Path, progress) -> None:
    """Put an archive's folder in its place: extracted beside it, then renamed, or moved into a folder with gaps."""
    home = data_root / archive.parent
    target, work = home / archive.top, home / f".{archive.top}.extracting"  # while `work` exists, `target` is not whole
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with progress(f"extract {archive.name}", path.stat().st_size, "B", 0) as bar:
            unpack(path, work, archive.limit, bar)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, DownloadError) as error:
        shutil.rmtree(work)
        broken = DownloadError(f"{path} cannot be extracted ({error}): delete it and run again")
        raise (error if isinstance(error, DownloadError) else broken) from None
    for folder, _, names in os.walk(work / archive.top):
        place = target / Path(folder).relative_to(work / archive.top)
        place.mkdir(exist_ok=True)
        for name in names:
            shutil.move(Path(folder) / name, place / name)
    shutil.rmtree(work)
    if not is_complete(archive, data_root):
        raise DownloadError(f"{path} holds fewer than {archive.files:,} files {archive.pattern}: it is not the archive")


def install(data_root, datasets, mirror, keep, progress, archives=None, say=print, sleep=time.sleep) -> None:
    """Download and extract what the data sets ("coco", "pets") miss under data_root; what is whole is left alone.

    `mirror`: address of a folder that holds the archives by name, or None for the publishers'; `keep`: keep the archives.
    """
    data_root = Path(data_root)
    chosen = [(a, is_complete(a, data_root)) for a in archives or ARCHIVES if a.dataset in datasets]
    check_space([archive for archive, done in chosen if not done], data_root, keep)
    store = data_root / "archives"
    store.mkdir(parents=True, exist_ok=True)
    lock = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for archive, done in chosen:
            if not done:
                path, url = store / archive.name, f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url
                fetch(archive, path, url, progress, sleep)
                extract(archive, path, data_root, progress)
                if not keep:
                    path.unlink()
            say(f"{data_root / archive.parent / archive.top} is complete")
        if not any(store.iterdir()):
            store.rmdir()
    except BlockingIOError:
        raise DownloadError(f"{store} is in use by another download: wait for it or stop it") from None
    finally:
        os.close(lock)
