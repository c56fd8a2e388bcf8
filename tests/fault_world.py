"""Small files of every kind that a study reads or writes, and the operations that read them, for faults in one process.

A Target names some files, the operation that reads them, and words one of which a refusal must hold.
"""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from faults import DAMAGES, KEEP_TIME, Snapshot, allow_everyone, without_rights
from small_runs import run
from study_folder import write_run

import carry_out
import data
import engine
import splits
import status
import weights
from arms import find_arm
from engine import Distributed, EngineError, hash_file
from groups import Study, StudyError
from models import build_mae
from runs import RunFolder
from study import read_plan, write_lines

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
SIZE = 8  # side of the cached squares
DATA = ["--num_train", 40, "--num_val", 16, "--num_pets", 14]
RECORDS = ("config.json", "metrics.json", "log.jsonl", "test.json", "test.npz", "panels.npz", "reconstruction.npz")
NOT_FOR_ALL = {"other JSON", "lost line", "a pipe"}  # damages that make sense for some files only


@dataclass
class Target:
    """Files, the operation that reads them -> its result, and what a refusal must name besides the file."""

    name: str
    files: list[Path]
    read: Callable[[], object]
    named: tuple[str, ...] = ()
    damages: tuple[str, ...] = ()  # of NOT_FOR_ALL
    others: list[bytes] = field(default_factory=list)  # older and other versions
    accepted: list[object] = field(default_factory=list)  # further right results


@dataclass(frozen=True)
class Outcome:
    """What came of a fault: same, refused, told or, which are failures, silent and traceback."""

    target: str
    damage: str
    verdict: str
    detail: str = ""


class World:
    """A folder with data, caches, runs and a study, and the targets in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = folder / "data"
        self.cache = folder / "cache"
        run("prepare", "demo", "--data_root", self.root, *DATA)
        self.targets = [
            *self.cache_targets(),
            *self.list_targets(),
            *self.checkpoint_targets(),
            *self.weight_targets(),
            *self.study_targets(),
        ]
        allow_everyone(folder)
        self.snapshot = Snapshot(folder)
        self.results = {target.name: target.read() for target in self.targets}
        self.snapshot.restore()

    def try_fault(self, rng: random.Random) -> Outcome:
        """Damage one file, read it again, and judge; the world is as before afterwards."""
        target = rng.choice(self.targets)
        path = rng.choice(target.files)
        damage = apply(target, path, rng)
        rights = without_rights() if damage == "rights taken" else contextlib.nullcontext()
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed), rights:
                result = target.read()
        except BaseException as error:
            verdict, detail = judge_error(error, target, path)
        else:
            verdict, detail = judge_result(result, self.results[target.name], target, path, printed.getvalue())
        finally:
            self.snapshot.force(path)
        return Outcome(target.name, damage, verdict, f"{path.relative_to(self.folder)}: {detail}")

    # -- decoded photos -------------------------------------------------------------------------------------------------

    def cache_targets(self) -> list[Target]:
        """Photos and trimaps, and what is decoded of them."""
        coco = splits.CocoPart(self.root, "val2017", cache_dir=self.cache).paths
        pets = list(splits.pets_split(self.root, "test").images + splits.pets_split(self.root, "train").images)
        read_photos = lambda: self.pixels(coco, "image")  # noqa: E731
        read_trimaps = lambda: self.pixels(pets, "trimap")  # noqa: E731
        read_photos()
        read_trimaps()
        photos = [self.root / name for name in coco]
        trimaps = [self.root / data.trimap_path(name) for name in pets]
        kept = {kind: sorted(self.cache.glob(f"{kind}s_*")) for kind in ("image", "trimap")}
        other = [photos[0].read_bytes(), trimaps[0].read_bytes()]
        return [
            Target("cached photos", kept["image"], read_photos, ("images_8_",), ("other JSON", "lost line")),
            Target("cached trimaps", kept["trimap"], read_trimaps, ("trimaps_8_",), ("other JSON", "lost line")),
            Target("photo", photos[1:], read_photos, damages=("a pipe",), others=other),
            Target("trimap", trimaps[1:], read_trimaps, damages=("a pipe",), others=other),
        ]

    def pixels(self, images: list[str], kind: str) -> tuple:
        """Complete the cache and read all rows."""
        data.build_cache(self.root, images, kind=kind, cache_dir=self.cache, cache_size=SIZE, workers=1)
        store = data.ImageStore(self.root, images, kind=kind, cache_dir=self.cache, cache_size=SIZE)
        return store.images, store.sizes, store.gather(np.arange(len(store)))

    # -- which images ---------------------------------------------------------------------------------------------------

    def list_targets(self) -> list[Target]:
        """Annotations and their digests, read by a run that has begun."""
        folder = self.folder / "begun"

        def read() -> tuple:
            split = splits.select_split(self.root, "mixed", cache_dir=self.cache)
            held_out = splits.mae_validation(self.root, cache_dir=self.cache)
            pets = [splits.pets_split(self.root, part) for part in splits.PETS_PARTS]
            every = [split, *held_out.values(), *pets]
            lists = {f"list {number}": split.sha256 for number, split in enumerate(every)}
            RunFolder(folder, ALONE, {"experiment": lists})._lock.close()
            return [split.images for split in every], [split.manifest for split in every]

        read()
        annotations = sorted(self.root.glob("coco/annotations/*.json"))
        digests = sorted(self.cache.glob("annotations_*.json"))
        list_txt = self.root / "oxford-iiit-pet/annotations/list.txt"
        named = ("holds another experiment: list", "annotations", "val2017", "train2017")
        both = ("other JSON", "lost line")
        others = [path.read_bytes() for path in (*annotations, *digests)]
        return [
            Target("annotations", annotations, read, named, both, others),
            Target("kept labels", digests, read, named, both, others),
            Target("list.txt", [list_txt], read, named, ("lost line",)),
        ]

    # -- runs -----------------------------------------------------------------------------------------------------------

    def checkpoint_targets(self) -> list[Target]:
        """The folder of a run that was interrupted."""
        folder = self.folder / "interrupted"
        self.write_checkpoints(folder, {"rate": 0.1, "seed": 0}, "pixels")
        others = []
        for rate, pixels in ((0.2, "pixels"), (0.1, "other pixels")):
            self.write_checkpoints(self.folder / "other", {"rate": rate, "seed": 0}, pixels)
            others += [path.read_bytes() for path in sorted((self.folder / "other").glob("[cl]*"))]
            shutil.rmtree(self.folder / "other")

        def read() -> tuple:
            run_folder = RunFolder(folder, ALONE, {"experiment": {"rate": 0.1, "seed": 0}})
            try:
                run_folder.bind(images="pixels")
                state = run_folder.load()
                assert state is not None, "the run would start over"
                run_folder.log("train", step=state["step"] + 1)
                return state["model"], state["step"], (folder / "log.jsonl").read_text()
            finally:
                run_folder._lock.close()

        files = [folder / name for name in ("config.json", "log.jsonl", "last.pt", "last.prev.pt")]
        others += [path.read_bytes() for path in files]
        (folder / "last.pt").rename(folder / "newest")
        earlier = read()
        shutil.copy(folder / "newest", folder / "last.pt")
        (folder / "newest").unlink()
        return [
            Target("interrupted run", files, read, ("interrupted",), ("other JSON", "lost line"), others, [earlier])
        ]

    def write_checkpoints(self, folder: Path, experiment: dict, pixels: str) -> None:
        """Write what a run leaves that is stopped after two checkpoints."""
        run_folder = RunFolder(folder, ALONE, {"experiment": experiment})
        run_folder.bind(images=pixels)
        generator = torch.Generator().manual_seed(len(str(experiment)))
        for step in (1, 2):
            run_folder.log("train", step=step, loss=1 / step)
            run_folder.save({"step": step, "model": {"weight": torch.randn(40, 30, generator=generator)}})
        run_folder._lock.close()

    def weight_targets(self) -> list[Target]:
        """The weights of a finished run, which others start from and are tested with."""
        folder = self.folder / "finished"
        contents = []
        for seed in (1, 0):
            shutil.rmtree(folder, ignore_errors=True)
            torch.manual_seed(seed)
            model = build_mae("mae_tiny", img_size=16)
            run_folder = RunFolder(folder, ALONE, {"experiment": {"seed": seed}})
            config = {"kind": "mae", "name": "mae_tiny", "img_size": 16}
            run_folder.finish({"model": model.state_dict(), "model_config": config}, {"updates": 1})
            run_folder._lock.close()
            contents.append((folder / "model.pt").read_bytes())

        def read() -> tuple:
            model, content = weights.load_model(folder / "model.pt")
            return weights.identify(folder / "model.pt"), model.state_dict(), content["model_config"]

        return [Target("weights", [folder / "model.pt"], read, others=contents[:1])]

    # -- a study --------------------------------------------------------------------------------------------------------

    def study_targets(self) -> list[Target]:
        """A finished study, as report.py, status.py and carry_out.py read it."""
        study = self.folder / "study"
        stages = (("pretrain", "animal"), ("finetune", "animal"), ("finetune", "half"))
        lines = [write_run(study, 0, find_arm(*names)) for names in stages]
        (study / "study.tsv").write_text(write_lines(lines))
        for line in lines:
            seal_run(study / line.folder)
            name = carry_out.run_name(line)
            (study / "logs").mkdir(exist_ok=True)
            (study / "logs" / f"{name}.command").write_text("python finetune.py")
        reference = dict(np.load(study / lines[1].folder / "test.npz"))
        arrays = {"ids": reference["ids"], "img_size": reference["img_size"], "counts_mean_mask": reference["counts"]}
        np.savez(study / "reference.npz", **arrays)

        def read() -> tuple:
            return read_study(study)

        named = ("study.tsv", "reference.npz", *(line.folder for line in lines))
        targets = [Target("plan", [study / "study.tsv"], read, named, ("lost line", "other JSON"))]
        for name in RECORDS:
            files = sorted(study.glob(f"seed0/*/{name}"))
            damages = ("lost line", "other JSON") if "json" in name else ()
            targets.append(Target(name, files, read, named, damages, [path.read_bytes() for path in files]))
        targets.append(Target("reference.npz", [study / "reference.npz"], read, named))
        targets.append(Target("commands", sorted((study / "logs").iterdir()), read, named))
        return targets


def seal_run(folder: Path) -> None:
    """Give the files of a synthetic run the checksums that true ones have."""
    config = json.loads((folder / "config.json").read_text())
    engine.write_json(folder / "config.json", config)
    (folder / "model.pt").write_bytes(folder.name.encode())
    metrics = json.loads((folder / "metrics.json").read_text())
    names = ("config.json", "log.jsonl", "model.pt", "reconstruction.npz")
    files = {name: hash_file(folder / name) for name in names if (folder / name).exists()}
    engine.write_json(folder / "metrics.json", {**metrics, "files": files})
    if (folder / "test.npz").exists():
        tested = {name: hash_file(folder / name) for name in ("test.npz", "panels.npz")}
        engine.write_json(folder / "test.json", {"weights": files["model.pt"], "files": tested})


def read_study(path: Path) -> tuple:
    """Read a study as a report does; what is wrong with it is an EngineError of its notes."""
    study = Study(path)
    plan = read_plan(path / "study.tsv")
    for line in plan:
        files = carry_out.Files(path, line)
        status.read_progress(path, line)
        carry_out.is_finished(files, "python finetune.py")
        carry_out.is_stale(files)
    carry_out.list_folders(path, plan, "untested")
    if study.notes:
        raise EngineError("; ".join(study.notes))
    runs = [(run.line, run.config, run.log, run.metrics, run.test) for run in study.runs]
    pictures = [found.arrays for found in (*study.panels, *study.reconstructions)]
    return runs, pictures, study.reference


# ----------------------------------------------------------------------------------------------------------------------
# Faults and verdicts


def is_same(a: object, b: object) -> bool:
    """Compare results to the bit, at any depth."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_same, a, b))
    return type(a) is type(b) and a == b


def explain(error: BaseException) -> str | None:
    """Give the one line that a script would print, None for a traceback."""
    if isinstance(error, StudyError):
        return str(error)
    failure = engine.explain(error)
    return None if failure is None else failure.message


def apply(target: Target, path: Path, rng: random.Random) -> str:
    """Do something to a file -> its name."""
    possible = [name for name in DAMAGES if name not in NOT_FOR_ALL or name in target.damages]
    if target.others:
        possible.append("other version")
    name = rng.choice(possible)
    before = path.stat()
    if name == "other version":
        path.write_bytes(rng.choice(target.others))
    else:
        DAMAGES[name](path, rng)
    if name in KEEP_TIME and rng.random() < 0.5:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return name


def judge_error(error: BaseException, target: Target, path: Path) -> tuple[str, str]:
    """Judge a refusal: it must be one line that names the thing."""
    message = explain(error)
    if message is None:
        return "traceback", f"{type(error).__name__}: {error}"
    if "\n" in message:
        return "traceback", f"several lines: {message}"
    if any(word in message for word in (path.name, *target.named)):
        return "refused", message
    return "silent", f"names nothing: {message}"


def judge_result(result: object, expected: object, target: Target, path: Path, printed: str) -> tuple[str, str]:
    """Judge a result: the same, or one that a line has announced."""
    if any(is_same(result, right) for right in (expected, *target.accepted)):
        return "same", ""
    told = [line for line in printed.splitlines() if path.stem in line and line.startswith(("changed:", "left out:"))]
    if told:
        return "told", told[0]
    return "silent", "another result"
