"""The decoded cache: kills, damage, changes, strange image files, a full disk."""

import contextlib
import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from faults import allow_writing, forbid_writing, open_folder, without_rights
from PIL import Image, ImageOps

import data
import splits

SAMPLE = os.environ.get("SAMPLE_ROOT")


def draw_photo(path: Path, seed: int, size=(40, 30), **options) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path.name


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "root"
    return root, [draw_photo(root / f"{i}.jpg", i, (40 + i % 7, 30)) for i in range(300)]


def content(cache: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(cache.iterdir())}


def rows(root, images, cache, kind="image", size=24):
    store = data.ImageStore(root, images, kind=kind, cache_dir=cache, cache_size=size)
    return store, store.gather(np.arange(len(store))).numpy()


def test_rows_are_the_squashed_images_in_request_order_and_repeats_share_one(photos, tmp_path):
    root, images = photos
    images = [*images[:5], images[2]]
    data.build_cache(root, images, cache_dir=tmp_path / "c", cache_size=24)
    store, got = rows(root, images, tmp_path / "c")
    for i, name in enumerate(images):
        expected = np.asarray(Image.open(root / name).resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.array_equal(got[i], expected)
    assert len(store) == 6 and store.rows.tolist() == [0, 1, 2, 3, 4, 2] and store.images == tuple(images)
    assert store.sizes.tolist()[1] == [30, 41] and len(store.sizes) == 5
    again = data.ImageStore(root, images, kind="image", cache_dir=tmp_path / "c", cache_size=24, on_device=True)
    assert np.array_equal(again.gather(np.arange(6)).numpy(), got)


def test_a_second_build_decodes_nothing_and_a_larger_one_appends(photos, tmp_path, monkeypatch):
    root, images = photos
    options = dict(cache_dir=tmp_path / "c", cache_size=8)
    data.build_cache(root, images[:20], **options)
    before = content(tmp_path / "c")
    with monkeypatch.context() as m:
        m.setattr(data, "read_image", lambda path: pytest.fail("decoded again"))
        data.build_cache(root, images[:20][::-1], **options)
    assert content(tmp_path / "c") == before
    data.build_cache(root, images[10:30], **options)
    after = content(tmp_path / "c")
    assert all(after[name].startswith(before[name]) and len(after[name]) > len(before[name]) for name in before)


BUILD = """
import sys, time, data
data.CHUNK = 8
root, cache, count = sys.argv[1:]
class Loud:
    def __init__(self, *_): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def update(self, n): print("one", flush=True), time.sleep(0.002)
images = [f"{i}.jpg" for i in range(int(count))]
data.build_cache(root, images, cache_dir=cache, cache_size=24, workers=2, progress=Loud)
"""


@pytest.mark.parametrize("seed, kills", [(0, 2), (1, 2), (2, 2), pytest.param(3, 10, marks=pytest.mark.slow)])
def test_a_build_killed_and_repeated_equals_one_in_peace_byte_for_byte(photos, tmp_path, seed, kills):
    (root, images), rng = photos, random.Random(seed)
    (root / "7.jpg").write_bytes(b"no image")  # a row of zeros survives it as well
    data.build_cache(root, images, cache_dir=tmp_path / "peace", cache_size=24)
    command = [sys.executable, "-c", BUILD, str(root), str(tmp_path / "killed"), "300"]
    for lines in rng.sample(range(1, 400 // kills), kills):  # each of them continues where the last one died
        child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(data.__file__).parent)
        for _ in range(lines):
            if not child.stdout.readline():
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(rng.uniform(0, 0.01))  # somewhere in decoding, writing or flushing
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert kills < 10 or child.returncode == -signal.SIGKILL
    data.build_cache(root, images, cache_dir=tmp_path / "killed", cache_size=24)
    assert content(tmp_path / "killed") == content(tmp_path / "peace")


def test_any_torn_tail_is_cut_off(photos, tmp_path):
    root, images = photos
    options = dict(cache_dir=tmp_path / "c", cache_size=8)
    data.build_cache(root, images[:40], **options)
    whole = content(tmp_path / "c")
    rng = random.Random(0)
    for _ in range(20):
        for path in (tmp_path / "c").iterdir():
            if rng.random() < 0.7:  # what a crash of the machine may leave
                path.write_bytes(whole[path.name][: rng.randrange(len(whole[path.name]))] + rng.choice([b"", b"\0\0"]))
        data.build_cache(root, images[:40], **options)
        assert content(tmp_path / "c") == whole


def test_the_index_is_a_json_list_for_each_row_and_ends_at_the_first_damaged_line(photos, tmp_path):
    root, images = photos
    (root / "2.jpg").write_bytes(b"")
    options = dict(kind="image", cache_dir=tmp_path / "c", cache_size=8)
    with pytest.raises(data.DataError, match="1 of 4 images"):
        data.build_cache(root, images[:4], **options)
    (index,) = (tmp_path / "c").glob("*.jsonl")
    whole = content(tmp_path / "c")
    texts = [line.split(" ", 1) for line in index.read_text().splitlines()]
    assert all(int(checksum, 16) == zlib.crc32(content.encode()) for checksum, content in texts)
    lines = [json.loads(content) for _, content in texts]
    stat = (root / "1.jpg").stat()
    row = next((tmp_path / "c").glob("*.u8")).read_bytes()[192:384]
    assert lines[1] == ["1.jpg", 41, 30, stat.st_size, stat.st_mtime_ns, None, zlib.crc32(row)]
    assert lines[2][:4] == ["2.jpg", 0, 0, 0] and lines[2][5].endswith("the file is empty")
    other_width = whole[index.name].splitlines(True)[1].replace(b"41", b"43")
    for damage in (b"[1, 2]\n", b"7\n", b"{}\n", b'"text"\n', b"[]\n", b"null\n", b'"abcdefg"\n', other_width):
        index.write_bytes(b"".join(whole[index.name].splitlines(True)[:1]) + damage)
        with pytest.raises(data.DataError, match="1 of 4 images"):
            data.build_cache(root, images[:4], **options)
        assert content(tmp_path / "c") == whole


def _build(root, images, cache):
    data.build_cache(root, images, cache_dir=cache, cache_size=8, workers=1)


def test_processes_that_build_at_once_make_one_cache(photos, tmp_path):
    root, images = photos
    data.build_cache(root, images[:60], cache_dir=tmp_path / "one", cache_size=8)
    children = [
        get_context("fork").Process(target=_build, args=(root, images[:60], tmp_path / "many")) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_a_replaced_image_is_noticed_and_decoded_anew(photos, tmp_path):
    root, images = photos
    data.build_cache(root, images[:5], cache_dir=tmp_path / "c", cache_size=24)
    draw_photo(root / "3.jpg", 999, (50, 50))
    with pytest.raises(data.DataError, match=r"1 of 5 .* changed since, first 3.jpg.*prepare.py cache"):
        rows(root, images[:5], tmp_path / "c")
    data.build_cache(root, images[:5], cache_dir=tmp_path / "c", cache_size=24)
    store, got = rows(root, images[:5], tmp_path / "c")
    expected = np.asarray(Image.open(root / "3.jpg").resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(got[3], expected) and store.sizes[3].tolist() == [50, 50]


def test_damaged_images_are_named_counted_and_left_out(photos, tmp_path, capsys):
    root, images = photos
    (root / "5.jpg").write_bytes((root / "5.jpg").read_bytes()[:-200])
    (root / "6.jpg").write_bytes(b"")
    (root / "8.jpg").write_text("this is text")
    data.build_cache(root, images, cache_dir=tmp_path / "c", cache_size=8)
    err = capsys.readouterr().err
    assert err.count("left out:") == 3
    assert "5.jpg: cannot be read: image file is truncated" in err
    assert "6.jpg: cannot be read: the file is empty" in err and "8.jpg: cannot be read: not an image" in err
    store, _ = rows(root, images, tmp_path / "c", size=8)
    assert store.dropped == ["5.jpg", "6.jpg", "8.jpg"] and len(store) == 297
    before = content(tmp_path / "c")
    data.build_cache(root, images, cache_dir=tmp_path / "c", cache_size=8)
    assert content(tmp_path / "c") == before
    (root / "9.jpg").unlink()
    with pytest.raises(data.DataError, match=r"4 of 300 images .*at most 1 %.*repair or delete"):
        data.build_cache(root, images, cache_dir=tmp_path / "c", cache_size=8)
    draw_photo(root / "9.jpg", 9)
    data.build_cache(root, images, cache_dir=tmp_path / "c", cache_size=8)
    assert len(rows(root, images, tmp_path / "c", size=8)[0]) == 297


def test_too_small_a_disk_is_told_in_numbers_before_anything_is_written(photos, tmp_path, monkeypatch):
    root, images = photos
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    with pytest.raises(data.DataError, match=r"need 0\.1 GB, 0\.0 GB are free.*--cache_dir") as error:
        data.build_cache(root, images, cache_dir=tmp_path / "c", cache_size=384)
    assert error.value.exit_code == 1 and not any(content(tmp_path / "c").values())


def test_a_disk_that_fills_up_ends_in_one_line_and_the_next_build_continues(photos, tmp_path, monkeypatch):
    root, images = photos
    data.build_cache(root, images, cache_dir=tmp_path / "peace", cache_size=8)
    calls, fsync = [], os.fsync

    def full(fd):
        calls.append(fd)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    with monkeypatch.context() as m:
        m.setattr(data.os, "fsync", full)
        with pytest.raises(
            data.DataError, match=r"cannot write .*No space left on device.* repeat the command"
        ) as error:
            data.build_cache(root, images, cache_dir=tmp_path / "full", cache_size=8)
    assert error.value.exit_code == 1
    data.build_cache(root, images, cache_dir=tmp_path / "full", cache_size=8)
    assert content(tmp_path / "full") == content(tmp_path / "peace")


@pytest.mark.parametrize("name", ["with space.jpg", "quo'te\".jpg", "new\nline.jpg", "ünïcode-猫.jpg", "dir.x/a.b.jpg"])
def test_any_file_name_works_and_stays_on_one_line(tmp_path, name, capsys):
    draw_photo(tmp_path / "root 'x'" / name, 1)
    data.build_cache(tmp_path / "root 'x'", [name], cache_dir=tmp_path / "c ache.v1", cache_size=8)
    assert len(rows(tmp_path / "root 'x'", [name], tmp_path / "c ache.v1", size=8)[0]) == 1
    (tmp_path / "root 'x'" / name).write_bytes(b"")
    with pytest.raises(data.DataError) as error:
        data.build_cache(tmp_path / "root 'x'", [name], cache_dir=tmp_path / "c ache.v1", cache_size=8)
    assert "\n" not in str(error.value) and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Strange image files


def test_every_mode_and_format_becomes_rgb(tmp_path):
    ramp = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(ramp)
    saved = {
        "grey.png": grey,
        "bits.png": grey.convert("1"),
        "palette.gif": grey.convert("P"),
        "cmyk.jpg": grey.convert("CMYK"),
        "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "float.tiff": Image.fromarray(ramp.astype(np.float32)),
        "la.png": grey.convert("LA"),
    }
    for name, image in saved.items():
        image.save(tmp_path / name)
        got = data.read_image(tmp_path / name)
        assert got.mode == "RGB" and got.size == (16, 16)
        if name != "bits.png":
            assert np.abs(np.asarray(got).astype(int) - ramp[..., None]).max() <= (12 if name == "cmyk.jpg" else 1)
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 255))
    half.save(tmp_path / "clear.png")
    (tmp_path / "clear.png").rename(tmp_path / "named.jpg")
    assert np.asarray(data.read_image(tmp_path / "named.jpg")).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    frames = [Image.new("P", (4, 4), k) for k in (0, 1)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert data.read_image(tmp_path / "moving.gif").size == (4, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_image_and_trimap_alike(tmp_path, orientation):
    classes = np.random.default_rng(orientation).integers(1, 4, (20, 30)).astype(np.uint8)
    images, trimaps = (tmp_path / "oxford-iiit-pet" / p for p in ("images", "annotations/trimaps"))
    images.mkdir(parents=True)
    trimaps.mkdir(parents=True)
    photo = Image.fromarray(np.stack([classes * 80] * 3, -1))
    exif = photo.getexif()
    exif[0x0112] = orientation
    photo.save(images / "a.png", exif=exif)
    Image.fromarray(classes).save(trimaps / "a.png")
    key = "oxford-iiit-pet/images/a.png"
    seen = data.read_image(tmp_path / key)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / key))
    assert np.array_equal(np.asarray(seen), np.asarray(upright))
    trimap = data.read_trimap(tmp_path / data.trimap_path(key), tmp_path / key)
    assert np.array_equal(np.asarray(seen)[..., 0] // 80, trimap + 1)
    truth = data.load_truth(tmp_path, [key], (10, 12))
    data.build_cache(tmp_path, [key], kind="trimap", cache_dir=tmp_path / "c", cache_size=10)
    _, got = rows(tmp_path, [key], tmp_path / "c", "trimap", 10)
    assert truth.shape == (1, 10, 12) and got.shape == (1, 1, 10, 10)
    assert np.array_equal(got[0, 0], data.load_truth(tmp_path, [key], 10)[0].numpy())


@pytest.mark.parametrize(
    "trimap, words",
    [
        (np.full((20, 30), 4, np.uint8), "found values 4 to 4"),
        (np.zeros((20, 30), np.uint8), "found values 0 to 0"),
        (np.ones((30, 20), np.uint8), "20 x 30, but its image is 30 x 20"),
        (np.ones((20, 30, 3), np.uint8), "found 3 dimensions"),
        (None, "No such file"),
    ],
)
def test_a_wrong_trimap_is_an_error_that_names_the_file(tmp_path, trimap, words):
    key = "oxford-iiit-pet/images/a b.jpg"
    draw_photo(tmp_path / key, 0, (30, 20))
    path = tmp_path / data.trimap_path(key)
    path.parent.mkdir(parents=True)
    if trimap is not None:
        Image.fromarray(trimap).save(path)
    with pytest.raises(data.DataError, match=words) as error:
        data.read_trimap(path, tmp_path / key)
    assert str(path) in str(error.value)
    with pytest.raises(data.DataError, match="every trimap is needed.*" + words):
        data.build_cache(tmp_path, [key], kind="trimap", cache_dir=tmp_path / "c", cache_size=8)
    with pytest.raises(data.DataError, match=words):
        data.load_truth(tmp_path, [key], 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bombs_are_refused(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(data.DataError, match=r"bomb\.png: .*refused"):
        data.read_image(tmp_path / "bomb.png")


def declare_png(width: int, height: int) -> bytes:
    """A PNG of less than 100 bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    sums = [struct.pack(">I", zlib.crc32(name + content)) for name, content in parts]
    chunks = [struct.pack(">I", len(c)) + name + c + end for (name, c), end in zip(parts, sums, strict=True)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


HUGE = {
    "bomb.png": declare_png(100_000, 100_000),
    "thin.png": declare_png(1, 2**31 - 1),
    "absurd.png": declare_png(2**31 - 1, 2**31 - 1),
    "screen.gif": struct.pack("<6sHH3x1s8xB", b"GIF89a", 65535, 65535, b",", 0) + b"\2\2L\1\0;",
    "bitmap.bmp": struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 1, 1, 0, 0),
}


@pytest.mark.filterwarnings("error")  # and without a warning of Pillow's
@pytest.mark.parametrize("name", HUGE)
def test_a_small_file_that_declares_an_enormous_size_is_refused_by_name(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(HUGE[name])
    assert len(HUGE[name]) < 100
    with pytest.raises(data.DataError, match=rf"{name}: cannot be read: more than 89,478,485 pixels, refused"):
        data.read_image(tmp_path / name)
    draw_photo(tmp_path / "good.jpg", 0)
    with pytest.raises(data.DataError, match=rf"1 of 2 images cannot be used .*{name}: .*refused"):
        data.build_cache(tmp_path, ["good.jpg", name], cache_dir=tmp_path / "c", cache_size=8)
    assert f"{name}: cannot be read: more than" in capsys.readouterr().err


def test_a_trimap_of_absurd_size_is_refused_by_name(tmp_path):
    key = "oxford-iiit-pet/images/a.jpg"
    draw_photo(tmp_path / key, 0)
    path = tmp_path / data.trimap_path(key)
    path.parent.mkdir(parents=True)
    path.write_bytes(declare_png(60_000, 60_000))
    with pytest.raises(data.DataError, match=r"trimaps/a\.png: cannot be read: more than .* refused"):
        data.read_trimap(path, tmp_path / key)


@pytest.mark.parametrize("ending", ["jpg", "png", "tiff", "webp"])
def test_exif_orientation_is_applied_once_in_every_format(tmp_path, ending):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / f"a.{ending}", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / f"a.{ending}")).convert("RGB")
    seen = data.read_image(tmp_path / f"a.{ending}")
    assert seen.size == (20, 30) and np.array_equal(np.asarray(seen), np.asarray(upright))


@pytest.mark.skipif(not SAMPLE, reason="SAMPLE_ROOT names no data root with real photos")
def test_real_photos_cache_without_complaint(tmp_path, capsys):
    images = splits.select_split(SAMPLE, "all", cache_dir=tmp_path).images
    pets = splits.pets_split(SAMPLE, "test").images
    data.build_cache(SAMPLE, images + pets, cache_dir=tmp_path, cache_size=64)
    data.build_cache(SAMPLE, pets, kind="trimap", cache_dir=tmp_path, cache_size=64)
    store, got = rows(SAMPLE, images + pets, tmp_path, size=64)
    assert capsys.readouterr().err == "" and not store.dropped and (got.std((1, 2, 3)) > 1).all()


def test_a_photo_that_is_replaced_renews_the_row_of_its_trimap(tmp_path):
    key, path = "oxford-iiit-pet/images/a.jpg", tmp_path / data.trimap_path("oxford-iiit-pet/images/a.jpg")
    path.parent.mkdir(parents=True)
    (tmp_path / key).parent.mkdir(parents=True)
    Image.fromarray(np.repeat([[1], [2]], 10, axis=0).repeat(30, axis=1).astype(np.uint8)).save(path)
    photo = Image.new("RGB", (30, 20))
    for orientation, first in ((1, 0), (3, 1)):  # 3: upside down
        exif = photo.getexif()
        exif[0x0112] = orientation
        photo.save(tmp_path / key, exif=exif)
        data.build_cache(tmp_path, [key], kind="trimap", cache_dir=tmp_path / "c", cache_size=8)
        store = data.ImageStore(tmp_path, [key], kind="trimap", cache_dir=tmp_path / "c", cache_size=8)
        assert store.gather([0])[0, 0, 0, 0] == first


# ---------------------------------------------------------------------------------------------------------------------
# What is no file, and a cache that belongs to someone else


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_in_the_place_of_a_photo_is_refused_by_name_and_nothing_waits_for_it(tmp_path, kind):
    key = "oxford-iiit-pet/images/a.jpg"
    (tmp_path / key).parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / key)
    else:
        (tmp_path / key).symlink_to("/dev/zero")
    words = r"a\.jpg: cannot be read: it is a pipe or device, not a file"
    with pytest.raises(data.DataError, match=words):
        data.read_image(tmp_path / key)
    with pytest.raises(data.DataError, match=words):
        data.read_trimap(tmp_path / data.trimap_path(key), tmp_path / key)
    with pytest.raises(data.DataError, match=words):
        data.build_cache(tmp_path, [key], cache_dir=tmp_path / "c", cache_size=8)


def test_a_name_that_no_file_can_have_is_reported_as_a_missing_photo(tmp_path):
    with pytest.raises(data.DataError, match="1 of 1 images cannot be used") as error:
        data.build_cache(tmp_path, ["a\0b.jpg"], cache_dir=tmp_path / "c", cache_size=8)
    assert "\n" not in str(error.value)


READ = """
import argparse, data, engine

parser = argparse.ArgumentParser("read")
parser.add_argument("photo")
engine.launch(lambda args: data.read_image(args.photo), parser)
"""


def test_an_enormous_photo_is_told_in_our_words_alone(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    command = [sys.executable, "-c", READ, str(tmp_path / "bomb.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(data.__file__).parent)
    assert done.stderr.startswith("read: error: ") and done.stderr.endswith("more than 89,478,485 pixels, refused\n")
    assert done.stderr.count("\n") == 1


def test_a_floating_point_photo_of_shares_is_not_read_as_black(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "shares.tiff")
    got = np.asarray(data.read_image(tmp_path / "shares.tiff")).astype(int)
    assert np.abs(got - np.arange(256).reshape(16, 16, 1)).max() <= 1
    ramp[0, 0], ramp[0, 1] = np.inf, np.nan
    Image.fromarray(ramp).save(tmp_path / "odd.tiff")
    odd = np.asarray(data.read_image(tmp_path / "odd.tiff")).astype(int)
    assert odd[0, 0, 0] == 255 and odd[0, 1, 0] == 0 and np.array_equal(odd[1:], got[1:])


@pytest.fixture
def others_cache():
    """A complete cache, one of its photos unreadable, in a folder that belongs to someone else -> (root, images, cache)."""
    with open_folder() as folder:
        root = folder / "root"
        images = [draw_photo(root / f"{i}.jpg", i) for i in range(150)]
        (root / "7.jpg").write_bytes(b"no photo")
        data.build_cache(root, images, cache_dir=folder / "cache", cache_size=8)
        forbid_writing(folder / "cache")
        yield root, images, folder / "cache"
        allow_writing(folder / "cache")


def test_a_complete_cache_of_someone_else_is_used(others_cache):
    root, images, cache = others_cache
    with without_rights():
        data.build_cache(root, images, cache_dir=cache, cache_size=8)
        store, _ = rows(root, images, cache, size=8)
    assert len(store) == 149 and store.dropped == ["7.jpg"]


def test_an_incomplete_cache_of_someone_else_is_refused_without_a_word_of_disk_space(others_cache):
    root, images, cache = others_cache
    draw_photo(root / "new.jpg", 1)
    with without_rights(), pytest.raises(data.DataError, match=r"cannot write .*Permission denied.*owner") as error:
        data.build_cache(root, [*images, "new.jpg"], cache_dir=cache, cache_size=8)
    assert error.value.exit_code == 1 and "space" not in str(error.value)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_as_the_cause(photos, tmp_path, monkeypatch, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    root, images = photos
    monkeypatch.setattr(data.fcntl, "flock", no_locks)
    with pytest.raises(data.DataError, match=r"cannot lock .*\.jsonl.*--cache_dir on a file system that has locks"):
        data.build_cache(root, images[:2], cache_dir=tmp_path / "c", cache_size=8)


def test_a_changed_bit_in_the_rows_is_noticed_before_any_use(photos, tmp_path):
    root, images = photos
    data.build_cache(root, images[:5], cache_dir=tmp_path / "c", cache_size=8)
    [path] = (tmp_path / "c").glob("*.u8")
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    words = r"\.u8: 1 of 5 rows are damaged, first that of 1\.jpg; delete this file and repeat the command"
    with pytest.raises(data.DataError, match=words) as error:
        rows(root, images[:5], tmp_path / "c", size=8)
    assert error.value.exit_code == 1
    assert len(rows(root, images[2:5], tmp_path / "c", size=8)[0]) == 3
    path.unlink()
    data.build_cache(root, images[:5], cache_dir=tmp_path / "c", cache_size=8)
    assert path.read_bytes() == whole
