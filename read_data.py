"""Read everything that a study needs before its first training, so that a damaged file is known of at once.

    python read_data.py runs/study           # run_all.sh calls this when the plan is made

Images are decoded into the cache that all runs share, so nothing is decoded twice. Ends with one line and exit code 1 or 2
where the study could not be carried out: more than 1 % of a list cannot be read, or a trimap.
"""

import argparse
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import data
from check_plan import parse_command
from engine import Parser, Progress, launch
from objective import Reading, list_readings
from study import read_plan


class Place(NamedTuple):
    """Where a run reads."""

    data_root: str
    cache_dir: str


def collect_readings(study: Path) -> list[tuple[Place, Reading]]:
    """List what the runs of a study read, each once."""
    found = {}
    for line in read_plan(study / "study.tsv"):
        kind, args = parse_command(line)
        for reading in list_readings(kind, args):
            place = Place(reading.root or args.data_root, args.cache_dir)
            found[place, reading] = None
    return list(found)


def read(place: Place, reading: Reading) -> None:
    """Read images or trimaps, into the cache if they have a size. DataError where too many cannot be read."""
    images = reading.images
    if reading.kind == "trimap":  # an image that cannot be opened is left out with its trimap
        images = [image for image in images if data.can_open(Path(place.data_root, image))]
    if reading.size is None:
        read_trimaps(place.data_root, images)
        return
    options = {"kind": reading.kind, "cache_dir": place.cache_dir, "cache_size": reading.size}
    data.build_cache(place.data_root, images, progress=Progress, **options)


def read_trimaps(data_root: str, images: Sequence[str]) -> None:
    """Read trimaps; DataError if one cannot be used."""

    def find_fault(image: str) -> str:
        try:
            data.read_trimap(Path(data_root, data.trimap_path(image)), Path(data_root, image))
        except data.DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(data.num_cores()) as pool:
        faults = [fault for fault in pool.map(find_fault, images) if fault]
    if faults:
        problem = (
            f"{len(faults):,} of {len(images):,} trimaps cannot be used (every trimap is needed), first {faults[0]}"
        )
        raise data.DataError(f"{problem}; see `python prepare.py verify --data_root {shlex.quote(data_root)}`")


def count_files(readings: list[tuple[Place, Reading]], kind: str) -> int:
    """Count the images, or trimaps, that are read."""
    return len({image for _, reading in readings if reading.kind == kind for image in reading.images})


def get_args_parser() -> Parser:
    """Make the parser."""
    parser = Parser("read_data.py", description="Read everything that a study needs before its first training")
    parser.add_argument("study", type=Path, help="the study's folder, with study.tsv")
    return parser


def main(args: argparse.Namespace) -> None:
    """Read what the runs of a study need, and say how much it was and how long it took."""
    start = time.monotonic()
    readings = collect_readings(args.study)
    photos = count_files(readings, "image")
    trimaps = count_files(readings, "trimap")
    print(f"reading {photos:,} photos and {trimaps:,} trimaps", flush=True)
    for place, reading in readings:
        read(place, reading)
    print(f"everything that the study needs can be read: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    launch(main, get_args_parser())
