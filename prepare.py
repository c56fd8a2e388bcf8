"""Get and check the data of the study.

    python prepare.py download --data_root data              # COCO 2017 and Oxford-IIIT Pet: 21 GB to fetch, resumable
    python prepare.py verify --data_root data                # decode every image once: minutes on many cores
    python prepare.py splits --data_root data                # every split beside the paper's numbers: under a minute
    python prepare.py cache --data_root data                 # decode ahead what trainings would decode on their first use
    python prepare.py demo --data_root data/demo             # draw a small set instead: a quarter of a minute, no network

Every command may be interrupted and repeated; what is complete is left alone.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import data
import demo
import download
import splits
from engine import Parser, Progress, launch, write_atomic

PAPER = {"animal": 25_739, "non_animal": 25_739, "mixed": 25_918, "validation": 1_090,
         "pets train": 5_144, "pets val": 1_102, "pets test": 1_103}  # fmt: skip


class PrepareError(ValueError):
    """Wrong use (exit code 2) or failure (1); the message is one line with what to do."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def run_download(args) -> None:
    """Fetch and extract what is missing."""
    if args.mirror and not args.mirror.startswith(("http://", "https://")):
        raise PrepareError(f"--mirror {args.mirror} must start with http:// or https://")
    download.install(args.data_root, args.only, args.mirror, args.keep_archives, Progress)


def all_splits(args) -> dict[str, splits.Split]:
    """Select every split the study can use: {title: split}, the paper's first."""
    select = partial(splits.select_split, args.data_root, split_seed=args.split_seed, cache_dir=args.cache_dir)
    table = {"animal": select("animal"), "animal unique": select("animal", animal_images="unique")}
    table |= {"animal single": select("animal", animal_images="single"), "non_animal": select("non_animal")}
    full = len(table["animal"].images) == PAPER["animal"]  # the paper's mixed set is larger than its others
    table |= {"mixed": select("mixed", num_images=PAPER["mixed"] if full else None), "all": select("all")}
    coco = splits._Coco(args.data_root, "val2017", None, args.cache_dir)
    for rule in splits.ANIMAL_IMAGES:  # pre-training's validation takes the unique ones
        title, definition = (
            f"validation {rule}".removesuffix(" per_category"),
            {"part": "val2017", "animal_images": rule},
        )
        table[title] = coco.split(title, coco.animal_list(rule), definition)
    table |= {f"pets {part}": splits.pets_split(args.data_root, part) for part in ("train", "val", "test")}
    return table


def print_table(rows: list[list[str]]) -> None:
    """Print rows of text in columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(c.rjust(w + 1) for c, w in zip(row[1:], widths[1:], strict=True)))


def run_splits(args) -> None:
    """Print all splits beside the paper's numbers and write their manifests."""
    table, output = all_splits(args), Path(args.output)
    if output.exists() and not output.is_dir():
        raise PrepareError(f"--output {output} is a file: name a folder")
    rows = [["split", "images", "paper", "unique", "animal", "no label", "person", "sha256"]]
    for title, split in table.items():
        m = split.manifest | {"paper": PAPER.get(title, "")}
        counts = [m.get(key, "") for key in ("entries", "paper", "unique", "animal_images", "without_annotation")]
        person = f"{m['person_share']:.1%}" if "person_share" in m else ""
        rows.append([title, *(f"{n:,}" if n != "" else "" for n in counts), person, split.sha256[:12]])
    print_table(rows)
    print("\nunique images with each animal:")
    shown = {title: table[title].manifest["categories"] for title in ("animal", "mixed", "all", "validation")}
    print_table([["", *shown["animal"]], *([t, *(f"{n:,}" for n in c.values())] for t, c in shown.items())])
    output.mkdir(parents=True, exist_ok=True)
    for title, split in table.items():
        text = json.dumps(split.manifest, indent=1)
        write_atomic(output / f"{title.replace(' ', '_')}.json", lambda file, text=text: file.write(text.encode()))
    print(f"\n{len(table)} manifests in {output}; no label: images without annotation; person: share that shows one")


def run_verify(args) -> None:
    """Decode every image and trimap the study can use; name each damaged or missing one."""
    root = Path(args.data_root)
    pets = [image for part in ("train", "val", "test") for image in splits.pets_split(root, part).images]
    coco = [path for part in ("train2017", "val2017") for path in splits._Coco(root, part, None, args.cache_dir).paths]
    jobs = [(data.read_image, root / path) for path in coco + pets]
    jobs += [(data.read_trimap, root / data.trimap_path(image), root / image) for image in pets]

    def check(job) -> str | None:
        try:
            job[0](*job[1:])
        except data.DataError as error:
            return str(error)
        return None

    damaged = []
    with ThreadPoolExecutor(args.workers) as pool, Progress("verify", len(jobs)) as bar:
        for start in range(0, len(jobs), 1024):  # in slices, so that Ctrl-C need not wait for the queue
            for problem in pool.map(check, jobs[start : start + 1024]):
                bar.update()
                if problem:
                    damaged.append(problem)
                    print(problem, flush=True)
    if damaged:
        advice = f"delete what is damaged; python prepare.py download --data_root {root} brings it back"
        raise PrepareError(f"{len(damaged):,} of {len(jobs):,} files damaged or missing (named above): {advice}", 1)
    print(f"{len(coco):,} COCO images, {len(pets):,} pets and their trimaps are readable")


def run_cache(args) -> None:
    """Decode the chosen splits, the validation images and the pets into the cache that all scripts share."""
    jobs, decoded = [], []
    for name in dict.fromkeys(args.splits):
        split = splits.select_split(args.data_root, name, split_seed=args.split_seed, cache_dir=args.cache_dir)
        jobs.append(("image", split.images))
        if name == "pets":
            held_out = [splits.pets_split(args.data_root, part).images for part in ("val", "test")]
            jobs += [("trimap", split.images), ("image", sum(held_out, ()))]
    if set(args.splits) - {"pets"}:
        jobs += [("image", s.images) for s in splits.mae_validation(args.data_root, cache_dir=args.cache_dir).values()]

    def progress(desc, total):
        decoded.append(total)
        return Progress(desc, total)

    start = time.perf_counter()
    for kind, images in jobs:
        data.build_cache(args.data_root, images, kind=kind, cache_dir=args.cache_dir, cache_size=args.cache_size,
                         workers=args.workers, progress=progress)  # fmt: skip
    seconds, size = time.perf_counter() - start, sum(f.stat().st_size for f in Path(args.cache_dir).glob("*.u8"))
    rate = f"{sum(decoded):,} decoded now, {sum(decoded) / seconds:,.0f} images/s" if decoded else "complete before"
    print(f"{args.cache_dir}: {size / 1e9:.2f} GB, {rate}")


def run_demo(args) -> None:
    """Draw the demo data beside its place and rename it, so that a killed drawing is never taken for whole."""
    root = Path(os.path.realpath(args.data_root))
    sizes = {"num_train": args.num_train, "num_val": args.num_val, "num_pets": args.num_pets}
    for name, minimum in (("num_train", 40), ("num_val", 16), ("num_pets", 14)):
        if sizes[name] < minimum:
            raise PrepareError(f"--{name} {sizes[name]} is too few for every split: use {minimum} or more")
    if args.seed < 0:
        raise PrepareError(f"--seed {args.seed} must be 0 or more")
    title = f"drawn demo photos\n{json.dumps({**sizes, 'seed': args.seed})}\n"
    work = root.parent / f".{root.name}.drawing"
    if is_drawn(root, title, args):
        return
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # a second drawing waits, then finds the first one's work
    try:
        if is_drawn(root, title, args):
            return
        for child in work.iterdir():
            shutil.rmtree(child, ignore_errors=True)
        start = time.perf_counter()
        with Progress("draw", sum(sizes.values())) as bar:
            for stream, part in enumerate(("train", "val")):
                demo.write_coco(work / "coco", f"{part}2017", sizes[f"num_{part}"], args.seed, stream, bar.update)
            demo.write_pets(work / "oxford-iiit-pet", sizes["num_pets"], args.seed, bar.update)
        (work / "DATASET.txt").write_text(title)
        os.rename(work, root)  # replaces an empty folder
        print(f"{args.data_root}: {sum(sizes.values()):,} photos drawn in {time.perf_counter() - start:.0f} s")
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):  # empty when another process has drawn meanwhile
            work.rmdir()


def is_drawn(root: Path, title: str, args) -> bool:
    """Tell whether this demo data set stands at `root`; raise PrepareError when something else does."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / "DATASET.txt"
    if file.is_file() and file.read_text() == title:
        print(f"{args.data_root} is complete")
        return True
    found = "a demo of other sizes or seed" if file.is_file() else "something else than a demo data set"
    raise PrepareError(f"--data_root {args.data_root} holds {found}: delete it or name another folder")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("prepare.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = {}
    for function in (run_download, run_verify, run_splits, run_cache, run_demo):
        name = function.__name__.removeprefix("run_")
        run[name] = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        run[name].set_defaults(function=function)
        folder = "data/demo" if name == "demo" else "data"
        run[name].add_argument("--data_root", default=folder, help="folder of the data sets")
        if name in ("verify", "splits", "cache"):
            run[name].add_argument("--cache_dir", default="cache", help="folder of the decoded cache")
        if name in ("splits", "cache"):
            run[name].add_argument("--split_seed", type=int, default=0, help="seed of the COCO draws")
        if name in ("verify", "cache"):
            run[name].add_argument("--workers", type=int, default=None, help="threads (default: about one a core)")
    add = run["download"].add_argument
    add("--only", nargs="+", choices=("coco", "pets"), default=("coco", "pets"), help="data sets to fetch")
    add("--mirror", help="address of a folder that holds the archives by name, instead of the publishers'")
    add("--keep_archives", action="store_true", help="keep the archives beside what they hold")
    run["splits"].add_argument("--output", default="splits", help="folder for the manifests")
    add = run["cache"].add_argument
    add("--cache_size", type=int, default=384, help="side of the squashed square in pixels; as in training")
    default = ("animal", "non_animal", "mixed", "pets")
    add("--splits", nargs="+", choices=splits.SPLITS, default=default, help="what to decode")
    add = run["demo"].add_argument
    add("--num_train", type=int, default=480, help="COCO-like training photos")
    add("--num_val", type=int, default=96, help="COCO-like validation photos")
    add("--num_pets", type=int, default=320, help="pet photos with trimaps")
    add("--seed", type=int, default=0, help="another seed draws other photos")
    return parser


def main(args) -> None:
    if getattr(args, "cache_size", 16) < 16 or (getattr(args, "workers", 1) or 1) < 1:
        raise PrepareError("--cache_size must be 16 or more and --workers 1 or more")
    try:
        args.function(args)
    except OSError as error:
        if error.errno in (28, None):  # a full disk is explained by launch
            raise
        raise PrepareError(f"{error.filename or args.data_root}: {error.strerror}", 1) from None


if __name__ == "__main__":
    launch(main, get_args_parser())
