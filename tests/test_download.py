"""Downloads survive bad networks and hostile archives: everything runs against a local HTTP server."""

import hashlib
import io
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import download
from download import Archive, DownloadError, install
from engine import Progress

FILES = {f"train2017/{i:012d}.jpg": bytes([i]) * 3000 for i in range(20)}


def make_zip(files, link=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            file.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def make_tar(files, special=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        if special:
            info = tarfile.TarInfo("train2017/special.jpg")
            info.type, info.linkname = special, "../../outside"
            file.addfile(info)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serve `content`; `cuts` lists after how many bytes the next answers break off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.ranges, self.type, self.status = b"", [], True, "application/zip", None
        self.offer_length, self.requests = True, []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, start = self.server, 0
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        if server.status:
            return self.send_error(server.status)
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Type", server.type)
        if server.offer_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


class Case:
    """A server with one archive, and a data root to install it in."""

    def __init__(self, server, root):
        self.server, self.root, self.naps, self.lines = server, root, [], []
        self.mirror = f"http://127.0.0.1:{server.server_port}/pub/"
        self.folder, self.part = root / "coco" / "train2017", root / "archives" / "train2017.zip.part"
        self.serve(make_zip(FILES))

    def serve(self, content, name="train2017.zip", limit=10**6):
        self.server.content = content
        md5 = hashlib.md5(content).hexdigest()
        self.archive = Archive(
            "coco", f"http://nowhere/{name}", len(content), md5, "coco", "train2017", limit, 20, "*.jpg"
        )

    def install(self, keep=False, progress=Progress):
        install(self.root, ["coco"], self.mirror, keep, progress, [self.archive], self.lines.append, self.naps.append)

    def refused(self):
        """Install, expect one clear line, and that nothing is taken for whole."""
        with pytest.raises(DownloadError) as error:
            self.install()
        assert error.value.exit_code == 1 and "\n" not in str(error.value)
        assert not self.folder.exists() and not download.is_complete(self.archive, self.root)
        assert (
            not (self.root / "archives" / self.archive.name).exists()
            or "extracted" in str(error.value)
            or "unpacks" in str(error.value)
        )
        return str(error.value)

    def installed(self):
        return {f"train2017/{path.name}": path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Case(server, tmp_path / "data")
        server.shutdown()
        thread.join()


def test_an_archive_becomes_its_folder_and_a_second_call_asks_for_nothing(case):
    case.install()
    assert case.installed() == FILES and not (case.root / "archives").exists()
    assert [path for path, _ in case.server.requests] == ["/pub/train2017.zip"]
    case.install()
    assert len(case.server.requests) == 1 and case.lines == [f"{case.folder} is complete"] * 2


def test_a_connection_cut_in_the_middle_is_resumed_where_it_broke(case):
    case.server.cuts = [10_000, 20_000]
    case.install()
    assert case.installed() == FILES
    assert [asked for _, asked in case.server.requests] == [None, "bytes=10000-", "bytes=30000-"]
    assert case.naps == [1, 2]


def test_a_cut_answer_without_length_is_noticed_and_resumed(case):
    case.server.cuts, case.server.offer_length = [10_000], False
    case.install()
    assert case.installed() == FILES


def test_what_an_earlier_call_left_is_continued(case):
    case.part.parent.mkdir(parents=True)
    case.part.write_bytes(case.server.content[:5000])
    case.install()
    assert case.installed() == FILES and case.server.requests[0][1] == "bytes=5000-"


def test_a_server_without_ranges_is_read_from_the_start_again(case):
    case.server.cuts, case.server.ranges = [10_000], False
    case.install()
    assert case.installed() == FILES and len(case.server.requests) == 2


def test_a_connection_that_always_breaks_ends_in_one_line_and_keeps_the_bytes(case):
    case.server.cuts = [1000] * 20
    message = case.refused()
    assert "run again to continue" in message and "the connection was cut" in message
    assert case.naps == [1, 2, 4, 8, 16, 32] and case.part.stat().st_size == 7000
    case.server.cuts = []
    case.install()
    assert case.installed() == FILES


def test_a_busy_server_is_tried_again_and_a_missing_file_is_not(case):
    case.server.status = 503
    assert "503" in case.refused() and len(case.naps) == 6
    case.server.status = 404
    assert "404" in case.refused() and len(case.naps) == 6


def test_a_wrong_byte_is_refused_and_the_next_call_starts_anew(case):
    good = case.server.content
    case.server.content = good[:7000] + bytes([good[7000] ^ 1]) + good[7001:]
    assert "damaged" in case.refused() and not case.part.exists()
    case.server.content = good
    case.install()
    assert case.installed() == FILES


def test_a_wrong_byte_in_what_an_earlier_call_left_is_refused(case):
    case.part.parent.mkdir(parents=True)
    case.part.write_bytes(b"x" * 5000)
    assert "MD5" in case.refused() and not case.part.exists()


def test_a_web_page_is_not_taken_for_an_archive(case):
    case.server.type, case.server.content = "text/html; charset=utf-8", b"<html>quota exceeded</html>"
    assert "web page" in case.refused() and case.part.stat().st_size == 0


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_refused_before_anything_is_read(case, change):
    case.server.content = case.server.content[:-1] if change < 0 else case.server.content + b"x"
    assert f"{len(case.server.content):,} bytes" in case.refused() and case.part.stat().st_size == 0


def test_more_bytes_than_published_are_refused_when_no_length_was_given(case):
    case.server.content, case.server.offer_length = case.server.content + b"x" * 100, False
    assert "damaged" in case.refused()


@pytest.mark.parametrize("content", [
    make_zip({**FILES, "../outside.jpg": b"x"}), make_zip({**FILES, "train2017/../../outside.jpg": b"x"}),
    make_zip({**FILES, "/tmp/outside.jpg": b"x"}), make_zip({**FILES, "..\\outside.jpg": b"x"}),
    make_zip(FILES, link="train2017/link"), make_tar({**FILES, "../outside.jpg": b"x"}),
    make_tar({**FILES, "/outside.jpg": b"x"}), make_tar(FILES, tarfile.SYMTYPE), make_tar(FILES, tarfile.LNKTYPE),
    make_tar(FILES, tarfile.CHRTYPE), make_tar(FILES, tarfile.FIFOTYPE),
], ids=["zip ..", "zip inner ..", "zip absolute", "zip backslash", "zip link", "tar ..", "tar absolute", "tar symlink",
        "tar hard link", "tar device", "tar fifo"])  # fmt: skip
def test_a_member_that_would_leave_the_folder_is_refused_and_nothing_is_extracted(case, content):
    case.serve(content, "train2017.zip" if content[:2] == b"PK" else "train2017.tar.gz")
    before = set(case.root.parent.rglob("*"))
    assert "nothing was extracted" in case.refused()
    left = {path for path in case.root.parent.rglob("*") if path.is_file()} - before
    assert left == {case.root / "archives" / case.archive.name}


def test_an_archive_that_unpacks_to_too_much_is_refused(case):
    for content, name in ((make_zip(FILES), "train2017.zip"), (make_tar(FILES), "train2017.tar.gz")):
        case.serve(content, name, limit=50_000)
        assert "unpacks to more than 50,000" in case.refused()


def test_a_tar_is_extracted_and_its_archive_kept_on_request(case):
    case.serve(make_tar(FILES), "train2017.tar.gz")
    case.install(keep=True)
    assert case.installed() == FILES
    shutil.rmtree(case.folder)
    case.install()
    assert case.installed() == FILES and len(case.server.requests) == 1 and not (case.root / "archives").exists()


class Interrupt:
    """A progress bar that raises KeyboardInterrupt at its n-th update while extracting."""

    def __init__(self, at):
        self.at = at

    def __call__(self, desc, *_):
        self.left = self.at if desc.startswith("extract") else 10**9
        return self

    def update(self, n=1):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_an_interrupted_extraction_is_not_taken_for_whole_and_is_repeated(case):
    for at in (1, 10, 20):
        with pytest.raises(KeyboardInterrupt):
            case.install(progress=Interrupt(at))
        assert not case.folder.exists() and not download.is_complete(case.archive, case.root)
    case.install()
    assert case.installed() == FILES and len(case.server.requests) == 1
    assert [path.name for path in case.folder.parent.iterdir()] == ["train2017"]


def test_an_interrupted_move_into_place_is_not_taken_for_whole_even_with_every_file_there(case, monkeypatch):
    moved = []

    def move(source, target, original=shutil.move):
        original(source, target)
        moved.append(target)
        if len(moved) == 20:  # the last one
            raise KeyboardInterrupt

    monkeypatch.setattr(download.shutil, "move", move)
    with pytest.raises(KeyboardInterrupt):
        case.install()
    assert case.installed() == FILES and not download.is_complete(case.archive, case.root)
    case.install()
    assert case.installed() == FILES and download.is_complete(case.archive, case.root)


def test_a_deleted_file_comes_back_and_files_of_ones_own_stay(case):
    case.install()
    victim, own = sorted(case.folder.iterdir())[3], case.folder / "notes.txt"
    victim.unlink()
    own.write_text("mine")
    case.install()
    assert victim.exists() and own.read_text() == "mine"


def test_a_disk_too_small_is_told_with_numbers_before_anything_is_written(case, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**6))
    message = case.refused()
    assert "needs 0.0 GB" in message and "0.0 GB are free" in message and not case.root.exists()
    full = [archive for archive in download.ARCHIVES if archive.dataset == "coco"]
    with pytest.raises(DownloadError, match=r"needs 41\.6 GB"):
        download.check_space(full, case.root, False)


def test_two_downloads_into_one_folder_do_not_meet(case):
    case.part.parent.mkdir(parents=True)
    with open("/dev/null"):
        lock = download.os.open(case.part.parent, download.os.O_RDONLY)
        download.fcntl.flock(lock, download.fcntl.LOCK_EX)
        assert "in use by another download" in case.refused()
        download.os.close(lock)
    case.install()
    assert case.installed() == FILES
