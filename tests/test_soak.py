"""Long trainings take no more memory than short ones, and leave no thread, file or map behind."""

import gc
import os
import threading
from pathlib import Path

import pytest
from small_runs import SMALL, drawn_root, log, mae_checkpoint, run

from runs import RunFolder

KINDS = ("pretrain", "finetune", "baseline")
SETTLED = 10  # validations after which caches and allocators are full
ALLOWED = 8 * 2**20  # bytes that the resident memory may wander


def resident() -> int:
    """Measure the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> list[str]:
    """List the files that this process holds open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:  # that of the listing itself
            continue
    return sorted(found)


@pytest.fixture
def flags(tmp_path, tmp_path_factory):
    place = ["--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path / "cache"]
    return [*place, "--output_dir", tmp_path / "run", *SMALL, "--batch_size", 4]


def words_of_kind(kind: str, tmp_path_factory) -> list:
    """The flags that a kind of training needs."""
    if kind == "finetune":
        return ["--model", "mae_tiny", "--init", mae_checkpoint(tmp_path_factory)]
    return ["--model", "mae_tiny"]


@pytest.mark.parametrize("kind", KINDS)
def test_stores_threads_and_files_end_with_their_run(kind, flags, tmp_path, tmp_path_factory):
    words = [*flags, *words_of_kind(kind, tmp_path_factory), "--epochs 2 --epoch_updates 3"]
    gc.collect()
    before = (open_files(), threading.active_count())
    run(kind, *words)
    gc.collect()
    after = (open_files(), threading.active_count())
    assert after == before
    assert str(tmp_path / "cache") not in Path("/proc/self/maps").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_2000_steps_and_50_validations_take_no_more_memory_than_a_few(
    kind, flags, tmp_path, tmp_path_factory, monkeypatch
):
    measured = []
    write_line = RunFolder.log

    def measure(self, event, **fields):
        write_line(self, event, **fields)
        if event == "val":
            gc.collect()
            measured.append((resident(), len(gc.get_objects())))

    monkeypatch.setattr(RunFolder, "log", measure)
    schedule = "--epochs 50 --epoch_updates 40 --save_minutes 0 --log_every 20"
    run(kind, *flags, *words_of_kind(kind, tmp_path_factory), schedule)
    assert len(measured) == 50 and log(tmp_path / "run", "train")[-1]["step"] == 2000
    first_memory, first_objects = measured[SETTLED]
    last_memory, last_objects = measured[-1]
    print(f"{kind}: {first_memory / 2**20:.1f} MiB after {SETTLED + 1} validations, {last_memory / 2**20:.1f} after 50")
    assert last_memory - first_memory < ALLOWED
    assert last_objects - first_objects < 2000, "a thousand rates are kept for their median, and nothing else"
