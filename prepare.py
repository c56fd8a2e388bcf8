"""Get and check the data of the study.

    python prepare.py download --data_root data              # COCO 2017 and Oxford-IIIT Pet: 21 GB to fetch, resumable
    python prepare.py verify --data_root data                # decode every image once: minutes on many cores
    python prepare.py splits --data_root data                # every split beside the paper's numbers: under a minute
    python prepare.py cache --data_root data                 # decode ahead what trainings would decode at first use
    python prepare.py demo --data_root data/demo             # draw a small set instead: twenty seconds, no network

Every command may be interrupted and repeated; what is complete is left alone.
"""

import argparse
import fcntl
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import data
import download
import draw as demo
import splits
from engine import Parser, Progress, launch, write_json

PAPER = {"animal": 25_739, "non_animal": 25_739, "mixed": 25_918, "validation": 1_090,
         "pets train": 5_144, "pets val": 1_102, "pets test": 1_103}  # fmt: skip


class PrepareError(data.DataError):
    """Wrong use (exit code 2) or failure (1); the message is one line with what to do."""


def run_download(args) -> None:
    """Fetch and extract what is missing."""
    if args.mirror and not args.mirror.startswith(("http://", "https://")):
        raise PrepareError(f"--mirror {args.mirror} must start with http:// or https://")
    download.install(args.data_root, args.only, args.mirror, args.keep_archives, Progress)


def print_table(rows: list[list]) -> None:
    """Print rows in columns, the first one to the left, numbers with separators."""
    rows = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(c.rjust(w + 1) for c, w in zip(row[1:], widths[1:], strict=True)))


def run_splits(args) -> None:
    """Print all splits beside the paper's numbers and write their manifests."""
    output, root, rules, lacking = Path(args.output), args.data_root, splits.ANIMAL_IMAGES, {}
    if output.exists() and not output.is_dir():
        raise PrepareError(f"--output {output} is a file: name a folder")
    select = partial(splits.select_split, root, split_seed=args.split_seed, cache_dir=args.cache_dir)
    table = {f"animal {rule}".removesuffix(" per_category"): select("animal", animal_images=rule) for rule in rules}
    full = len(table["animal"].images) == PAPER["animal"]  # the paper's mixed set is larger than its others
    for title, count in (("non_animal", None), ("mixed", PAPER["mixed"] if full else None)):
        try:
            table[title] = select(title, num_images=count)
        except data.DataError as error:  # other data may have fewer images without animals; the rest is still shown
            lacking[title] = f"{title}: {str(error).partition(';')[0]}"
    table["all"], coco = select("all"), splits._Coco(root, "val2017", None, args.cache_dir)
    for rule in rules:  # pre-training's validation takes the unique ones
        title, facts = f"validation {rule}".removesuffix(" per_category"), {"part": "val2017", "animal_images": rule}
        table[title] = coco.split(title, coco.animal_list(rule), facts)
    table |= {f"pets {part}": splits.pets_split(root, part) for part in ("train", "val", "test")}
    rows = [["split", "images", "paper", "unique", "animal", "no label", "person", "sha256"]]
    for title, split in table.items():
        m = split.manifest | {"paper": PAPER.get(title, "")}
        counts = [m.get(key, "") for key in ("entries", "paper", "unique", "animal_images", "without_annotation")]
        rows.append([title, *counts, f"{m['person_share']:.1%}" if "person_share" in m else "", split.sha256[:12]])
    print_table(rows)
    print("\nunique images with each animal:")
    shown = [title for title in ("animal", "mixed", "all", "validation") if title in table]
    shown = {title: table[title].manifest["categories"] for title in shown}
    print_table([["", *shown["animal"]], *([title, *counts.values()] for title, counts in shown.items())])
    output.mkdir(parents=True, exist_ok=True)
    for title, split in table.items():
        write_json(output / f"{title.replace(' ', '_')}.json", split.manifest)
    print(f"\n{len(table)} manifests in {output}; no label: images without annotation; person: share that shows one")
    for title in lacking:
        (output / f"{title}.json").unlink(missing_ok=True)  # of other data
    if lacking:
        raise PrepareError(f"{'; '.join(lacking.values())}: give pretrain.py a smaller --num_images for every split", 1)


def run_verify(args) -> None:
    """Decode every image and trimap the study can use; name each damaged or missing one."""
    root, damaged = Path(args.data_root), 0
    pets = [image for part in ("train", "val", "test") for image in splits.pets_split(root, part).images]
    coco = [path for part in ("train2017", "val2017") for path in splits._Coco(root, part, None, args.cache_dir).paths]
    jobs = [(data.read_image, root / path) for path in coco + pets]
    jobs += [(data.read_trimap, root / data.trimap_path(image), root / image) for image in pets]

    def is_damaged(job) -> bool:
        try:
            job[0](*job[1:])
        except data.DataError as error:
            print(error, flush=True)
            return True
        return False

    with ThreadPoolExecutor(args.workers) as pool, Progress("verify", len(jobs)) as bar:
        for start in range(0, len(jobs), 1024):  # in slices, so that Ctrl-C need not wait for the queue
            for found in pool.map(is_damaged, jobs[start : start + 1024]):
                damaged += found
                bar.update()
    if damaged:
        advice = f"delete what is damaged; python prepare.py download --data_root {root} brings it back"
        raise PrepareError(f"{damaged:,} of {len(jobs):,} files damaged or missing (named above): {advice}", 1)
    print(f"{len(coco):,} COCO images, {len(pets):,} pets and their trimaps are readable")


def run_cache(args) -> None:
    """Decode the chosen splits, the validation images and the pets into the cache that all scripts share."""
    root, where, jobs, decoded, start = args.data_root, {"cache_dir": args.cache_dir}, [], [], time.perf_counter()
    for name in dict.fromkeys(args.splits):
        jobs.append(("image", splits.select_split(root, name, split_seed=args.split_seed, **where).images))
        if name == "pets":
            held_out = [splits.pets_split(root, part).images for part in ("val", "test")]
            jobs += [("trimap", jobs[-1][1]), ("image", sum(held_out, ()))]
    if set(args.splits) - {"pets"}:
        jobs += [("image", split.images) for split in splits.mae_validation(root, **where).values()]

    def progress(desc, total):
        decoded.append(total)
        return Progress(desc, total)

    where |= {"cache_size": args.cache_size, "workers": args.workers, "progress": progress}
    for kind, images in jobs:
        data.build_cache(root, images, kind=kind, **where)
    seconds, size = time.perf_counter() - start, sum(f.stat().st_size for f in Path(args.cache_dir).glob("*.u8"))
    rate = f"{sum(decoded):,} decoded now, {sum(decoded) / seconds:,.0f} images/s" if decoded else "complete before"
    print(f"{args.cache_dir}: {size / 1e9:.2f} GB, {rate}")


def run_demo(args) -> None:
    """Draw the demo data beside its place and rename it, so that a killed drawing is never taken for whole."""
    root, start = Path(os.path.realpath(args.data_root)), time.perf_counter()
    sizes = {"num_train": args.num_train, "num_val": args.num_val, "num_pets": args.num_pets, "seed": args.seed}
    for (name, value), minimum in zip(sizes.items(), (40, 16, 14, 0), strict=True):
        if value < minimum:
            few = "too few for every split" if minimum else "no seed"
            raise PrepareError(f"--{name} {value} is {few}: use {minimum} or more")
    title, work = f"drawn demo photos\n{json.dumps(sizes)}\n", root.parent / f".{root.name}.drawing"
    root.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(root.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second drawing waits, then finds the first one's work
        label = root / "DATASET.txt"
        if label.is_file() and label.read_text() == title:
            return print(f"{args.data_root} is complete")
        if root.is_file() or (root.is_dir() and any(root.iterdir())):
            found = "a demo of other sizes or seed" if label.is_file() else "something else than a demo data set"
            raise PrepareError(f"--data_root {args.data_root} holds {found}: delete it or name another folder")
        shutil.rmtree(work, ignore_errors=True)
        with Progress("draw", sum(sizes.values()) - args.seed) as bar:
            demo.write_coco(work / "coco", "train2017", args.num_train, args.seed, 0, bar.update)
            demo.write_coco(work / "coco", "val2017", args.num_val, args.seed, 1, bar.update)
            demo.write_pets(work / "oxford-iiit-pet", args.num_pets, args.seed, bar.update)
        (work / "DATASET.txt").write_text(title)
        os.rename(work, root)  # replaces an empty folder
        print(f"{args.data_root}: {bar.total:,} photos drawn in {time.perf_counter() - start:.0f} s")
    finally:
        os.close(lock)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("prepare.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands, add = parser.add_subparsers(dest="command", required=True), {}
    for function in (run_download, run_verify, run_splits, run_cache, run_demo):
        name = function.__name__.removeprefix("run_")
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        add[name] = command.add_argument
        add[name]("--data_root", default="data/demo" if name == "demo" else "data", help="folder of the data sets")
        if name in ("verify", "splits", "cache"):
            add[name]("--cache_dir", default="cache", help="folder of the decoded cache")
        if name in ("splits", "cache"):
            add[name]("--split_seed", type=int, default=0, help="seed of the COCO draws")
        if name in ("verify", "cache"):
            add[name]("--workers", type=int, default=None, help="threads (default: about one a core)")
    add["download"]("--only", nargs="+", choices=("coco", "pets"), default=("coco", "pets"), help="what to fetch")
    add["download"]("--mirror", help="address of a folder that holds the archives by name, not the publishers'")
    add["download"]("--keep_archives", action="store_true", help="keep the archives beside what they hold")
    add["splits"]("--output", default="splits", help="folder for the manifests")
    add["cache"]("--cache_size", type=int, default=384, help="side of the squashed square in pixels; as in training")
    default = ("animal", "non_animal", "mixed", "pets")
    add["cache"]("--splits", nargs="+", choices=splits.SPLITS, default=default, help="what to decode")
    for name, count in (("train", 480), ("val", 96), ("pets", 320)):
        add["demo"](f"--num_{name}", type=int, default=count, help="photos to draw, like COCO's or with trimaps (pets)")
    add["demo"]("--seed", type=int, default=0, help="another seed draws other photos")
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
