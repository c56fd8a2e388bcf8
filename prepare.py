"""Get and check the data of the study.

    python prepare.py download --data_root data              # COCO 2017 and Oxford-IIIT Pet: 21 GB to fetch, resumable
    python prepare.py verify --data_root data                # decode every image once: minutes on many cores
    python prepare.py splits --data_root data                # every split and the paper's numbers: under a minute
    python prepare.py cache --data_root data                 # decode ahead what trainings would decode at first use
    python prepare.py demo --data_root data/demo             # draw a small set instead: twenty seconds, no network

Every command may be interrupted and repeated; what is complete is left alone.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import data
import download
import draw
import folders
import splits
from engine import Parser, Progress, launch, write_json

# Number of images of the paper's splits, by their titles in the table.
PAPER = {
    "animal": 25_739,
    "non_animal": 25_739,
    "mixed": 25_918,
    "validation": 1_090,
    "pets train": 5_144,
    "pets val": 1_102,
    "pets test": 1_103,
}
PETS_PARTS = ("train", "val", "test")
DATA_SETS = ("coco", "pets")
VERIFY_SLICE = 1024  # files submitted at a time, so that Ctrl-C need not wait for all
MIN_CACHE_SIZE = 16
LARGE_SPLITS = {"all"}  # decoded only when named: 52 GB for COCO at 384 pixels

MIN_DEMO = {"num_train": 40, "num_val": 16, "num_pets": 14}  # fewer leave a split empty


class PrepareError(data.DataError):
    """Wrong use (exit code 2) or failure (1); the message is one line with what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# download


def run_download(args: argparse.Namespace) -> None:
    """Fetch and extract what is missing."""
    if args.mirror and not args.mirror.startswith(("http://", "https://")):
        raise PrepareError(f"--mirror {args.mirror} must start with http:// or https://")
    download.install(args.data_root, args.only, args.mirror, args.keep_archives, Progress)


# ----------------------------------------------------------------------------------------------------------------------
# verify


class Check(NamedTuple):
    """One file to verify: a function that raises DataError if it is damaged, and its arguments."""

    read: Callable
    paths: tuple[Path, ...]


def run_verify(args: argparse.Namespace) -> None:
    """Decode every image and trimap the study can use; name each damaged or missing one."""
    root = Path(args.data_root)
    pets = list_pets(root)
    coco = []
    for part in ("train2017", "val2017"):
        coco += splits.CocoPart(root, part, cache_dir=args.cache_dir).paths
    checks = [Check(data.read_image, (root / image,)) for image in coco + pets]
    checks += [Check(data.read_trimap, (root / data.trimap_path(image), root / image)) for image in pets]
    damaged = count_damaged(checks, args.workers)
    if damaged > 0:
        advice = f"delete what is damaged; python prepare.py download --data_root {root} brings it back"
        raise PrepareError(f"{damaged:,} of {len(checks):,} files damaged or missing (named above): {advice}", 1)
    print(f"{len(coco):,} COCO images, {len(pets):,} pets and their trimaps are readable")


def list_pets(root: Path) -> list[str]:
    """List the images of all parts of Oxford-IIIT Pet."""
    images = []
    for part in PETS_PARTS:
        images += splits.pets_split(root, part).images
    return images


def count_damaged(checks: list[Check], workers: int | None) -> int:
    """Run checks in threads, print an error for each damaged file and return their number."""
    damaged = 0
    with ThreadPoolExecutor(workers) as pool, Progress("verify", len(checks)) as bar:
        for start in range(0, len(checks), VERIFY_SLICE):
            for good in pool.map(run_check, checks[start : start + VERIFY_SLICE]):
                if not good:
                    damaged += 1
                bar.update()
    return damaged


def run_check(check: Check) -> bool:
    """Read one file; print the error and return False if it is damaged."""
    try:
        check.read(*check.paths)
    except data.DataError as error:
        print(error, flush=True)
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# splits


def run_splits(args: argparse.Namespace) -> None:
    """Print all splits and the paper's numbers, and write their manifests."""
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise PrepareError(f"--output {output} is a file: name a folder")
    table = {}
    missing = {}
    too_few = []
    for title, select in list_selections(args).items():
        try:
            table[title] = select()
            continue
        except splits.DataNotFoundError as error:
            missing.setdefault(str(error), []).append(title)
        except splits.TooFewImagesError as error:  # other data may have fewer images; the rest is still shown
            too_few.append(f"{title}: {str(error).partition(';')[0]}")
        manifest_path(output, title).unlink(missing_ok=True)  # of other data
    if not table:
        problems = [*missing, *too_few]
        raise PrepareError(problems[0])
    print_splits(table)
    print_categories(table)
    if args.images is None:
        print_rules()
    output.mkdir(parents=True, exist_ok=True)
    for title, split in table.items():
        write_json(manifest_path(output, title), split.manifest)
    print(f"\n{len(table)} manifests in {output}; no label: images without annotation; person: share that shows one")
    report_unfilled(missing, too_few)


def manifest_path(output: Path, title: str) -> Path:
    """Return the file that holds the manifest of a row of the table."""
    return output / f"{title.replace(' ', '_')}.json"


def list_selections(args: argparse.Namespace) -> dict[str, Callable[[], splits.Split]]:
    """List the rows of the table: title -> what selects the split. All rules of splits.SPLITS are among them."""
    if args.images is not None:
        return list_own_selections(args)
    rows = {}
    if "coco" in args.only:
        rows |= list_pretraining_selections(args)
    if "pets" in args.only:
        for part in PETS_PARTS:
            rows[f"pets {part}"] = partial(splits.pets_split, args.data_root, part)
    return rows


def list_own_selections(args: argparse.Namespace) -> dict[str, Callable[[], splits.Split]]:
    """List the rows of a table of one's own images, and print what is to be said of them."""
    own = folders.read_tree(args.images, split_seed=args.split_seed)
    for remark in own.remarks:
        print(f"note: {remark}")
    return {"images": lambda: own.train, "images held out": lambda: own.held_out}


def list_pretraining_selections(args: argparse.Namespace) -> dict[str, Callable[[], splits.Split]]:
    """List the rows of the splits of pre-training and of what it is validated on."""
    root = args.data_root
    options = {
        "split_seed": args.split_seed,
        "cache_dir": args.cache_dir,
        "exclude_categories": args.exclude_categories,
    }
    rows = {}
    for name in splits.split_names():
        if name == "animal":
            for listing in splits.ANIMAL_IMAGES:
                rows[listing_title(name, listing)] = partial(
                    splits.select_split, root, name, animal_images=listing, **options
                )
        elif name == "mixed":
            rows[name] = partial(splits.select_split, root, name, num_images=mixed_size(root, **options), **options)
        else:
            rows[name] = partial(splits.select_split, root, name, **options)
    for listing in splits.ANIMAL_IMAGES:  # pre-training's validation takes the unique ones
        title = listing_title("validation", listing)
        rows[title] = partial(select_validation, root, args.cache_dir, title, listing)
    return rows


def listing_title(name: str, listing: str) -> str:
    """Title the row of one way of listing animals; the paper's way goes without saying."""
    if listing == "per_category":
        return name
    return f"{name} {listing}"


def mixed_size(root: str, **options: object) -> int | None:
    """Return the size of the paper's mixed split, larger than its others, if the data is the paper's; else None."""
    try:
        size = splits.reference_size(root, **options)
    except (splits.DataNotFoundError, splits.TooFewImagesError):
        return None
    if size == PAPER["animal"]:
        return PAPER["mixed"]
    return None


def select_validation(root: str, cache_dir: str, title: str, listing: str) -> splits.Split:
    """Select all animal entries of val2017."""
    coco = splits.CocoPart(root, "val2017", cache_dir=cache_dir)
    definition = {"part": "val2017", "animal_images": listing}
    return coco.make_split(title, coco.animal_entries(listing), definition)


def print_splits(table: dict[str, splits.Split]) -> None:
    """Print the sizes and contents of splits and the paper's numbers."""
    rows = [["split", "images", "paper", "unique", "animal", "no label", "person", "sha256"]]
    for title, split in table.items():
        manifest = split.manifest
        person = ""
        if "person_share" in manifest:
            person = f"{manifest['person_share']:.1%}"
        row = [
            title,
            manifest["entries"],
            PAPER.get(title, ""),
            manifest["unique"],
            manifest.get("animal_images", ""),
            manifest.get("without_annotation", ""),
            person,
            split.sha256[:12],
        ]
        rows.append(row)
    print_table(rows)


def print_categories(table: dict[str, splits.Split]) -> None:
    """Print how many unique images show each animal category, for the splits of COCO that hold animals."""
    rows = []
    for title in (*splits.split_names(), "validation"):
        if title not in table:
            continue
        manifest = table[title].manifest
        if manifest["animal_images"] == 0 or "categories" not in manifest["definition"]:
            continue
        if not rows:
            rows.append(["", *manifest["categories"]])
        rows.append([title, *manifest["categories"].values()])
    if rows:
        print("\nunique images with each animal:")
        print_table(rows)


def print_rules() -> None:
    """Print what each rule chooses."""
    print("\nvalues of --split:")
    names = splits.split_names()
    width = max(len(name) for name in names)
    for name in names:
        print(f"{name.ljust(width)}  {splits.describe_rule(name)}".rstrip())


def print_table(rows: list[list]) -> None:
    """Print rows in columns: the first aligned to the left, the others to the right, thousands separated."""
    texts = []
    for row in rows:
        texts.append([f"{cell:,}" if isinstance(cell, int) else cell for cell in row])
    widths = [max(len(cell) for cell in column) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width + 1))
        print(" ".join(cells))


def report_unfilled(missing: dict[str, list[str]], too_few: list[str]) -> None:
    """Raise PrepareError if rows of the table are not there: their data set is missing, or it holds too few images."""
    problems = []
    advice = ""
    for message, titles in missing.items():
        reason, _, advice = message.partition("; ")  # the same advice for all
        problems.append(f"not shown: {', '.join(titles)}: {reason}")
    if advice:
        problems[-1] += f"; {advice}"
    if too_few:
        problems.append(f"{'; '.join(too_few)}: give pretrain.py a smaller --num_images for every split")
    if problems:
        raise PrepareError("; ".join(problems), 1)


# ----------------------------------------------------------------------------------------------------------------------
# cache


class CacheJob(NamedTuple):
    """Images or trimaps to decode."""

    kind: str  # "image" or "trimap"
    images: tuple[str, ...]


def run_cache(args: argparse.Namespace) -> None:
    """Decode the chosen splits, the validation images and the pets into the cache that all scripts share."""
    start = time.perf_counter()
    decoded = 0

    def progress(description: str, total: int) -> Progress:
        nonlocal decoded
        decoded += total
        return Progress(description, total)

    for job in list_cache_jobs(args):
        data.build_cache(
            args.data_root,
            job.images,
            kind=job.kind,
            cache_dir=args.cache_dir,
            cache_size=args.cache_size,
            workers=args.workers,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in Path(args.cache_dir).glob("*.u8"))
    rate = "complete before"
    if decoded > 0:
        rate = f"{decoded:,} decoded now, {decoded / seconds:,.0f} images/s"
    print(f"{args.cache_dir}: {size / 1e9:.2f} GB, {rate}")


def list_cache_jobs(args: argparse.Namespace) -> list[CacheJob]:
    """List what trainings on the chosen splits read: their images, held-out images, and for pets the trimaps."""
    root = args.data_root
    names = list(dict.fromkeys(args.splits))
    jobs = []
    for name in names:
        split = splits.select_split(root, name, split_seed=args.split_seed, cache_dir=args.cache_dir)
        jobs.append(CacheJob("image", split.images))
        if name == "pets":
            held_out = splits.pets_split(root, "val").images + splits.pets_split(root, "test").images
            jobs.append(CacheJob("trimap", split.images))
            jobs.append(CacheJob("image", held_out))
    if names != ["pets"]:
        for split in splits.mae_validation(root, cache_dir=args.cache_dir).values():
            jobs.append(CacheJob("image", split.images))
    return jobs


# ----------------------------------------------------------------------------------------------------------------------
# demo


def run_demo(args: argparse.Namespace) -> None:
    """Draw the demo data in a temporary folder and rename it, so that a killed drawing is never taken for complete."""
    start = time.perf_counter()
    check_demo_sizes(args)
    root = Path(os.path.realpath(args.data_root))
    sizes = {"num_train": args.num_train, "num_val": args.num_val, "num_pets": args.num_pets, "seed": args.seed}
    description = f"drawn demo photos\n{json.dumps(sizes)}\n"
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(root.parent):
        if is_drawn(root, description, args.data_root):
            print(f"{args.data_root} is complete")
            return
        count = draw_demo(args, root, description)
    print(f"{args.data_root}: {count:,} photos drawn in {time.perf_counter() - start:.0f} s")


def check_demo_sizes(args: argparse.Namespace) -> None:
    """Raise PrepareError for sizes that leave a split empty, and for a negative seed."""
    for name, minimum in MIN_DEMO.items():
        value = getattr(args, name)
        if value < minimum:
            raise PrepareError(f"--{name} {value} is too few for every split: use {minimum} or more")
    if args.seed < 0:
        raise PrepareError(f"--seed {args.seed} is no seed: use 0 or more")


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder's lock: a second drawing waits and then finds the work of the first."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_drawn(root: Path, description: str, shown: str) -> bool:
    """Say whether a folder holds this very demo; raise PrepareError if it holds anything else."""
    label = root / "DATASET.txt"
    if label.is_file() and label.read_text() == description:
        return True
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        content = "something else than a demo data set"
        if label.is_file():
            content = "a demo of other sizes or seed"
        raise PrepareError(f"--data_root {shown} holds {content}: delete it or name another folder")
    return False


def draw_demo(args: argparse.Namespace, root: Path, description: str) -> int:
    """Draw the demo data set into root, which must be missing or empty -> number of photos."""
    work = root.parent / f".{root.name}.drawing"
    shutil.rmtree(work, ignore_errors=True)
    count = args.num_train + args.num_val + args.num_pets
    with Progress("draw", count) as bar:
        draw.write_coco(work / "coco", "train2017", args.num_train, args.seed, 0, bar.update)
        draw.write_coco(work / "coco", "val2017", args.num_val, args.seed, 1, bar.update)
        draw.write_pets(work / "oxford-iiit-pet", args.num_pets, args.seed, bar.update)
    (work / "DATASET.txt").write_text(description)
    os.rename(work, root)  # replaces an empty folder
    return count


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def get_args_parser() -> argparse.ArgumentParser:
    """Make the parser of all five commands."""
    parser = Parser("prepare.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_download(commands)
    add_verify(commands)
    add_splits(commands)
    add_cache(commands)
    add_demo(commands)
    return parser


def add_command(commands, function: Callable, data_root: str = "data") -> argparse.ArgumentParser:
    """Add the command that a function run_NAME carries out; data_root: the default of its flag."""
    name = function.__name__.removeprefix("run_")
    parser = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
    parser.set_defaults(function=function)
    parser.add_argument("--data_root", default=data_root, help="folder with coco/ and oxford-iiit-pet/")
    return parser


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache_dir", default="cache", help="folder of decoded images and annotations, as in training")


def add_only(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument(
        "--only", nargs="+", choices=DATA_SETS, default=DATA_SETS, help=f"data sets to {verb} (default: both)"
    )


def add_split_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split_seed", type=int, default=0, help="seed of the draws; another one selects other images")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="threads that decode (default: about one a core)")


def add_download(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, run_download)
    add = parser.add_argument
    add_only(parser, "fetch")
    add("--mirror", help="address of a folder that holds the archives by name, to use instead of the publishers'")
    add("--keep_archives", action="store_true", help="keep the archives after extraction; needs twice the disk space")


def add_verify(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, run_verify)
    add_cache_dir(parser)
    add_workers(parser)


def add_splits(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, run_splits)
    add_cache_dir(parser)
    add_split_seed(parser)
    add_only(parser, "list")
    add = parser.add_argument
    add("--images", metavar="DIR", help="list one's own images instead, as pretrain.py --images does")
    add(
        "--exclude_categories",
        nargs="+",
        metavar="CATEGORY",
        help="list pre-training images without these COCO categories, as pretrain.py does with this flag",
    )
    add("--output", default="splits", help="folder for the manifests, a JSON file for each split")


def add_cache(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, run_cache)
    add_cache_dir(parser)
    add_split_seed(parser)
    add_workers(parser)
    names = splits.split_names()
    default = [name for name in names if name not in LARGE_SPLITS]
    add = parser.add_argument
    add("--cache_size", type=int, default=384, help="side of the cached squares in pixels; give trainings the same")
    add("--splits", nargs="+", choices=names, default=default, help=f"splits to decode (default: {' '.join(default)})")


def add_demo(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, run_demo, data_root="data/demo")
    add = parser.add_argument
    add("--num_train", type=int, default=480, help="photos to draw in the place of COCO's training images")
    add("--num_val", type=int, default=96, help="photos to draw in the place of COCO's validation images")
    add("--num_pets", type=int, default=320, help="photos of pets to draw, with trimaps")
    add("--seed", type=int, default=0, help="another seed draws other photos")


def main(args: argparse.Namespace) -> None:
    """Carry out one command; an error of the file system becomes a PrepareError of one line."""
    check_arguments(args)
    try:
        args.function(args)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EPIPE, None):  # launch explains these
            raise
        raise PrepareError(f"{error.filename or args.data_root}: {error.strerror}", 1) from None


def check_arguments(args: argparse.Namespace) -> None:
    """Raise PrepareError for numbers out of range, of the commands that take them."""
    cache_size = getattr(args, "cache_size", MIN_CACHE_SIZE)
    workers = getattr(args, "workers", None)
    if cache_size < MIN_CACHE_SIZE or (workers is not None and workers < 1):
        raise PrepareError(f"--cache_size must be {MIN_CACHE_SIZE} or more and --workers 1 or more")


if __name__ == "__main__":
    launch(main, get_args_parser())
