"""Download COCO 2017 and Oxford-IIIT Pet: resumed, retried, checked by MD5, extracted only into the target folder.

An archive grows as `<data_root>/archives/<name>.part` and gets its name when its MD5 agrees; a folder is extracted
beside its place and moved there when whole. So nothing half-written is ever taken for whole, wherever it is killed.
Imports nothing from this collection; `prepare.py download` is its command line.
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
from collections import namedtuple
from pathlib import Path, PurePosixPath

CHUNK, RETRIES = 1 << 20, 6
COCO, PETS = "http://images.cocodataset.org/", "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"


class Archive(namedtuple("Archive", "dataset url size md5 parent top limit files pattern")):
    """A published archive whose folder `top`, `limit` bytes at most, becomes <data_root>/<parent>/<top>."""

    name = property(lambda self: self.url.rsplit("/", 1)[1])


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


class DownloadError(ValueError):
    """A download or extraction that failed; the message is one line with what to do."""

    exit_code = 1


def is_complete(archive: Archive, data_root: Path) -> bool:
    """Tell whether an archive's folder is whole: its files are there and no unfinished extraction is beside it."""
    home = data_root / archive.parent
    enough = len(list((home / archive.top).rglob(archive.pattern))) >= archive.files
    return enough and not (home / f".{archive.top}.extracting").exists()


def check_space(archives, data_root: Path, keep: bool) -> None:
    """Raise DownloadError unless the disk holds the archives (one at a time unless kept) and what they unpack to."""
    store, sizes = data_root / "archives", [0, *(archive.size for archive in archives)]
    there = sum(file.stat().st_size for a in archives for file in store.glob(a.name + "*"))
    needed = sum(archive.limit for archive in archives) + (sum(sizes) if keep else max(sizes)) - there
    free = shutil.disk_usage(next(folder for folder in (data_root, *data_root.parents) if folder.exists())).free
    if free < needed:
        advice = f"{free / 1e9:.1f} GB are free: make room or name another --data_root"
        raise DownloadError(f"{data_root} needs {needed / 1e9:.1f} GB for archives and files, {advice}")


def open_url(url: str, start: int, size: int):
    """Ask for `size` bytes from `start` on: (response, first byte sent); DownloadError for what no retry can mend."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:
            raise
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}: check --mirror") from None
    first, length = start if response.status == 206 else 0, response.headers.get("Content-Length", "")
    total, problem = int(length) + first if length.isdigit() else size, None
    if "html" in response.headers.get("Content-Type", ""):
        problem = "sends a web page"
    elif total != size:
        problem = f"offers {total:,} bytes"
    elif first and not (span := response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
        problem = f"answers the range from byte {start} with {span!r}"
    if problem:
        response.close()
        raise DownloadError(f"{url}: the server {problem}, not the archive of {size:,} bytes: check --mirror")
    return response, first


def fetch(archive: Archive, path: Path, url: str, progress, sleep) -> None:
    """Download an archive to `path` by way of `path.part`, continuing what is there, and check its MD5.

    A lost connection is tried again after 1, 2, 4 … seconds, RETRIES times without 8 MB more than ever before.
    """
    source, failures = path if path.exists() else Path(f"{path}.part"), 0
    local = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # the disk's faults, not the network's
    with source.open("a+b") as file:
        size = best = file.tell()
        with progress(f"download {path.name}", archive.size, "B", size) as bar:
            while size < archive.size and source != path:
                reason = "the connection was cut"
                try:
                    response, first = open_url(url, size, archive.size)
                    with response:
                        if first != size:  # no support for ranges: all over again
                            bar.update(-size)
                            size = file.truncate(0)
                        while size <= archive.size and (chunk := response.read(CHUNK)):
                            size += file.write(chunk)
                            bar.update(len(chunk))
                except (OSError, http.client.HTTPException) as error:
                    if getattr(error, "errno", None) in local:
                        raise
                    reason = str(error) or type(error).__name__
                if size < archive.size:
                    failures, best = (1, size) if size >= best + 8 * CHUNK else (failures + 1, best)
                    if failures > RETRIES:
                        raise DownloadError(f"{url}: {reason}; {size:,} bytes are kept: run again to continue")
                    sleep(min(60, 2 ** (failures - 1)))
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.md5()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != archive.md5:
        source.unlink()
        found = f"{size:,} bytes with MD5 {digest.hexdigest()}, not {archive.size:,} with {archive.md5}"
        raise DownloadError(f"{url}: {found}: damaged, removed; run again to download it anew")
    source.rename(path)


def unpack(path: Path, folder: Path, limit: int, bar) -> None:
    """Extract a .zip or .tar.gz into an empty folder: plain files and folders below it, `limit` bytes at most."""
    zipped, total, done = path.suffix == ".zip", 0, 0
    options = {} if zipped or not hasattr(tarfile, "data_filter") else {"filter": "data"}
    with path.open("rb") as raw, zipfile.ZipFile(raw) if zipped else tarfile.open(fileobj=raw, mode="r|gz") as file:
        for member in file.infolist() if zipped else file:
            name, size = (member.filename, member.file_size) if zipped else (member.name, member.size)
            # a zip made on Unix holds the file's mode: its highest bits are 8 for a file, 4 for a folder, 0 if unknown
            plain = member.external_attr >> 28 in (0, 4, 8) if zipped else member.isreg() or member.isdir()
            parts, total = PurePosixPath(name).parts, total + size
            leaves = name.startswith("/") or ".." in parts or "\\" in name or ":" in "".join(parts[:1])
            if leaves or not plain:
                raise DownloadError(f"{path}: {name!r} is a link, device or outside its folder: nothing was extracted")
            if total > limit:
                raise DownloadError(f"{path} unpacks to more than {limit:,} bytes: it is not the published archive")
            file.extract(member, folder, **options)
            bar.update(raw.tell() - done)
            done = raw.tell()


def extract(archive: Archive, path: Path, data_root: Path, progress) -> None:
    """Put an archive's folder in its place: extracted beside it, then moved, also into a folder with gaps."""
    home = data_root / archive.parent
    target, work = home / archive.top, home / f".{archive.top}.extracting"  # while `work` exists, `target` is not whole
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with progress(f"extract {path.name}", path.stat().st_size, "B", 0) as bar:
            unpack(path, work, archive.limit, bar)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError, IsADirectoryError,
            NotADirectoryError, DownloadError) as error:  # fmt: skip
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


def install(data_root, datasets, mirror, keep, progress, archives=ARCHIVES, say=print, sleep=time.sleep) -> None:
    """Download and extract what the data sets ("coco", "pets") miss under data_root; what is whole is left alone.

    `mirror`: address of a folder with the archives, or None for the publishers'; `keep`: keep the archives;
    `progress`: factory (desc, total, unit, initial) of a context manager with update(n). Raises DownloadError.
    """
    data_root = Path(data_root)
    chosen = [(a, is_complete(a, data_root)) for a in archives if a.dataset in datasets]
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
