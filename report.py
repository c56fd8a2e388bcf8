"""Make the report of a study from its records and logs alone: tables (Markdown, CSV, JSON), statistics and figures.

    python report.py runs/study                    # writes runs/study/report/report.md in seconds
    python report.py runs/study --title "Batch 64" --output /tmp/report

Needs study.tsv and the run folders without their checkpoints; neither images nor a GPU, and no torch. A missing, unfinished
or deviating run is named in the report and left out of averages. Ends with exit code 2 for a folder that is no study.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from pathlib import Path

import numpy as np

import figures
from metrics import CLASSES, ratio, scores, t_interval
from study import (
    ARMS,
    MARGIN,
    PRETRAINED,
    Estimate,
    Study,
    StudyError,
    estimates,
    label_of,
    load_npz,
    planned,
    pretrained,
)

RESNET, SUPERVISED, ANIMAL, HALF, NON_ANIMAL, MIXED, PETS, ALL = ARMS
TRIVIAL = {"all_animal": "all animal", "all_background": "all background", "mean_mask": "mean training mask"}
PAPER = {"epochs": {"pretrain": 150, "finetune": 100, "baseline": 100}, "img_size": 224, "model": "mae_base"}
PAPER_IMAGES = {("pretrain", "animal"): 25_739, ("pretrain", "mixed"): 25_918, ANIMAL: 5_144}
FLAGS = ("epochs", "batch_size", "blr", "weight_decay", "warmup_epochs", "min_lr", "layer_decay", "drop_path", "crop_scale",
         "flips", "clip_grad", "mask_ratio", "norm_pix_loss", "cache_size", "img_size", "model")  # fmt: skip
FIGURES = ("forest", "curves", "distribution", "pretraining", "reconstruction", "masks", "dose", "labels", "scatter")
PARAGRAPHS = Path(__file__).with_suffix(".txt").read_text().split("\n\n")[1:]
TEXTS = {p.partition(": ")[0]: " ".join(p.partition(": ")[2].split()) for p in PARAGRAPHS}
TABLES = {k.removeprefix("table "): v for k, v in TEXTS.items() if k.startswith("table ")}


def show(value, digits: int = 3, brief: bool = False) -> str:
    """Format a table cell; `brief` gives the half width of an interval in place of its limits."""
    if isinstance(value, Estimate) and not math.isnan(value.low):
        ends = (
            f"±{(value.high - value.low) / 2:.{digits}f}"
            if brief
            else f"[{value.low:.{digits}f}, {value.high:.{digits}f}]"
        )
        return f"{value.value:.{digits}f} {ends}"
    value = value.value if isinstance(value, Estimate) else value
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return (
        f"{value:.{digits}f}"
        if isinstance(value, float)
        else f"{value:,}"
        if type(value) is int
        else str(value).replace("|", "/")
    )


def markdown(rows: list[dict], columns: str, brief: bool = False) -> str:
    """Draw rows as a table with the columns of TABLES' notation; a column that no row has is left out."""
    specs = [
        (c.partition("=")[0].partition(":")[0].strip(), c.rpartition("=")[2].strip()) for c in columns.split(" | ")
    ]
    specs = [(key, *head.partition(":")[::2]) for key, head in specs if any(key in row for row in rows)]
    lines = [[head for _, head, _ in specs], ["---"] * len(specs)]
    lines += [[show(row.get(key), int(digits or 3), brief) for key, _, digits in specs] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(out: Path, name: str, rows: list[dict]) -> None:
    """Write rows as CSV and JSON with every digit; an interval becomes two more columns."""
    flat = []
    for row in rows:
        ends = [
            (k + end, v)
            for k, x in row.items()
            if isinstance(x, Estimate)
            for end, v in zip(("", "_low", "_high"), x, strict=True)
        ]
        plain = {k: v for k, v in row.items() if not isinstance(v, Estimate)} | {k: float(v) for k, v in ends}
        flat.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()})
    (out / f"{name}.json").write_text(json.dumps(flat, indent=1, ensure_ascii=False) + "\n")
    with open(out / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in flat for k in row)))
        writer.writeheader()
        writer.writerows(flat)


class Report:
    """The sections of a report, collected as Markdown; a section appears when its runs exist."""

    def __init__(self, study: Study, out: Path, title: str | None):
        self.study, self.main, self.out, self.parts, self.count = study, study.main, out, [], 0
        out.mkdir(parents=True, exist_ok=True)
        for name in [f"{t}.{e}" for t in TABLES for e in ("csv", "json")] + [f"{f}.png" for f in FIGURES]:
            (out / name).unlink(missing_ok=True)  # of an earlier report
        configs = [r.config for r in study.runs if r.config]
        self.data = next((c["data"]["title"] for c in configs if "data" in c), "unknown data")
        small = [
            c
            for c in configs
            if c["args"].get("model") not in ("mae_base", "resnet50") or c["args"].get("img_size") != 224
        ]
        self.demo = "demo" in self.data or bool(small)
        self.title = (
            f"{title or 'Pre-training images and segmentation after fine-tuning'}: {self.data}{' (demo)' * self.demo}"
        )
        self.seeds = "thin: seeds, thick: their mean" if len({r.seed for r in study.runs}) > 1 else "one seed"

    def add(self, *blocks: str) -> None:
        self.parts += [b.rstrip() + "\n" for b in blocks if b]

    def text(self, name: str, **values) -> None:
        self.add(TEXTS[name].format(**values))

    def figure(self, name: str, draw, *args, log: bool = False, **values) -> None:
        self.count += 1
        draw(self.out / f"{name}.png", *args, **({"log": True} if log else {}))
        caption = TEXTS[name].format(margin=MARGIN, seeds=self.seeds, **values)
        self.add(f"![Figure {self.count}]({name}.png)", f"*Figure {self.count}. {caption}*")

    def table(self, name: str, rows: list[dict], hidden: tuple = ()) -> None:
        rows = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
        write_table(self.out, name, rows)
        self.add(markdown(rows, TABLES[name]))

    def write(self) -> None:
        self.rows = planned(self.study)
        table, protocol, notes = self.table2(), self.protocol(), self.study.notes
        self.add(f"# {self.title}", TEXTS["demo"] if self.demo else "", f"**{self.headline(table)}**")
        self.text("differs" if protocol else "same", what="; ".join(protocol))
        if notes:
            self.add("## Runs that are missing or differ", "\n".join(f"- {note}" for note in notes))
        else:
            self.add(f"All {len(self.study.runs)} runs finished, with equal settings where averaged or compared.")
        self.add("## Results beside the paper's Table 2", TEXTS["table2"])
        self.table("table2", table)
        for section in (self.differences, self.arms, self.all_metrics, self.learning, self.examples, self.doses, self.labels,
                        self.pretraining_loss, self.appendix):  # fmt: skip
            section()
        (self.out / "report.md").write_text("\n".join(self.parts))

    def protocol(self) -> list[str]:
        """Say where this study differs from the paper's protocol, from the recorded settings."""
        found = []
        for key in (("pretrain", "animal"), ("pretrain", "mixed"), ANIMAL, RESNET):
            for c in [r.config for r in self.study.runs if r.key == key and r.config][:1]:
                have = {k: (c["args"].get(k), PAPER[k]) for k in ("model", "img_size") if (k, key) != ("model", RESNET)}
                have["epochs"] = c["args"].get("epochs"), PAPER["epochs"][key[0]]
                have["images"] = c["n_train"], PAPER_IMAGES.get(key, c["n_train"])
                parts = [f"{k} {show(a)} ({show(b)})" for k, (a, b) in have.items() if a != b]
                found += [f"{label_of(key)}: {', '.join(parts)}"] if parts else []
        return found

    def table2(self) -> list[dict]:
        rows = []
        for key, (label, paper) in ARMS.items():
            groups = self.study.groups.get(key)
            if groups is None and paper is None:
                continue
            for i, runs in enumerate(groups or [[]]):
                row = {"arm": label + (f" (seed {runs[0].seed}: other settings)" if i else ""), "seeds": len(runs)}
                if runs:
                    found = estimates(runs)
                    row |= {
                        k: found[k].times(100 if k == "accuracy" else 1) for k in ("loss", "iou", "accuracy", "miou")
                    }
                    row["interval"] = "t over seeds" if len(runs) > 1 else "bootstrap over images"
                if paper and not i:
                    row |= {"paper_loss": paper[0], "paper_iou": paper[1], "paper_accuracy": paper[2]}
                row["note"] = "not part of this study" if groups is None else "" if i else self.study.left_out(key)
                rows.append(row)
            rows += self.reference_row("best score a stride-32 output could reach", "stride32") if key == RESNET else []
        return rows + [row for name, label in TRIVIAL.items() for row in self.reference_row(f"trivial: {label}", name)]

    def reference_row(self, label: str, name: str) -> list[dict]:
        counts = self.study.reference.get(f"counts_{name}")
        if counts is None:
            return []
        s = {k: float(v) for k, v in scores(counts.sum(0)).items()}
        return [{"arm": label, "iou": s["iou"], "accuracy": 100 * s["accuracy"], "miou": s["miou"], "reference": name}]

    def headline(self, table: list[dict]) -> str:
        arms = sorted((r for r in table if isinstance(r.get("iou"), Estimate)), key=lambda r: r["iou"].value)
        if not arms:
            return "No arm has been trained and tested yet."
        low, high = (f"{r['iou'].value:.3f} ({r['arm']})" for r in (arms[0], arms[-1]))
        trivial = [r["iou"] for r in table if r.get("reference") in TRIVIAL]
        text = f"On {self.data}, test IoU runs from {low} to {high}"
        text += f"; the best trivial predictor has {max(trivial):.3f}." if trivial else "."
        row = self.rows[0] if self.rows and self.rows[0]["pair"] == (ANIMAL, NON_ANIMAL) else None
        if not row or not row["values"]:
            return text
        mean, n = row["mean"], len(row["values"])
        text += f" Pre-training on animals instead of non-animals changes it by {mean.value:+.1f} points"
        if n == 1:
            return text + ": one seed, which cannot show whether another would repeat it."
        text += f" (95 % interval {mean.low:+.1f} to {mean.high:+.1f}, {n} seeds)"
        if row["holm"] < 0.05:
            return text + f", a difference beyond the seeds' noise (Holm-corrected p = {row['holm']:.3f})."
        if row["tost"] < 0.05:
            return text + f": equivalent within ±{MARGIN} points (TOST p = {row['tost']:.3f})."
        if mean.low <= 0 <= mean.high:
            return text + ": these seeds neither show a difference nor rule one out."
        return text + (f"; not tested: {row['reason']}." if row["reason"] else ", not significant after correction.")

    def differences(self) -> None:
        rows = [r for r in self.rows if r["values"]]
        if not self.rows:
            return
        single = max(len(r["values"]) for r in self.rows) < 2
        self.add("## Planned differences")
        self.text("one_seed" if single else "differences", margin=MARGIN)
        shown = [r | {"each": ", ".join(f"{v:+.2f}" for v in r["values"])} for r in self.rows]
        hidden = ("pair", "images", "values", "seeds", *(("p", "holm", "tost", "mean") if single else ()))
        self.table("differences", shown, hidden)
        if not rows:
            return
        means = [r["mean"] if len(r["values"]) > 1 else None for r in rows]
        bars = [{"label": r["label"], "seeds": r["images"], "mean": m} for r, m in zip(rows, means, strict=True)]
        self.figure("forest", figures.forest, bars, MARGIN)
        self.text("image_bootstrap")
        images = [(r["label"], *pair) for r in rows for pair in zip(r["seeds"], r["images"], strict=True)]
        self.table("image_bootstrap", [{"label": k, "seed": seed, "difference": v} for k, seed, v in images])

    def arms(self) -> None:
        rows = []
        for key in self.study.groups:
            for run in self.main(key)[:1]:
                c, parent = run.config, self.study.pretraining(run)
                row = {"arm": label_of(key), "images": c["n_train"], "unique": c["n_unique"], "updates": c["updates"]}
                manifest, before = (
                    c.get("manifest", {}).get("train", {}),
                    parent.config.get("updates") if parent else None,
                )
                rows.append(
                    row | {"batch": c.get("batch_size"), "animals": manifest.get("animal_images"), "before": before}
                )
        if rows:
            self.add("## What each arm was trained on")
            self.table("arms", rows)
        if self.main(HALF) and self.main(ANIMAL):
            self.text("half", a=self.main(HALF)[0].config, b=self.main(ANIMAL)[0].config)

    def all_metrics(self) -> None:
        arms = [(label_of(k), self.main(k)) for k in ARMS if self.main(k)]
        if not arms:
            return
        self.add("## All metrics", TEXTS["metrics"])
        rows = []
        for per_image, level in enumerate(("dataset", "mean over images")):
            for native, size in enumerate(("input size", "native size")):
                part = [
                    {"arm": k, "seeds": len(v), **estimates(v, bool(native), bool(per_image), 2000)} for k, v in arms
                ]
                part = [row | {"level": level, "resolution": size} for row in part]
                self.add(f"**{level}, {size}**", markdown(part, TABLES["metrics"], brief=True))
                rows += part
        write_table(self.out, "metrics", rows)
        rows = []
        for label, runs in arms:
            best, last = (Estimate(*t_interval([r.metrics[when]["iou"] for r in runs])) for when in ("best", "last"))
            epochs = ", ".join(f"{r.metrics['best']['epoch']:g}" for r in runs)
            rows.append({"arm": label, "seeds": len(runs), "best": best, "epoch": epochs, "last": last})
        self.text("validation")
        self.table("validation", rows)

    def curves(self, keys: list[tuple], fields: dict[str, tuple[str, str]]) -> dict:
        """Collect logged curves of arms: fields name -> (event, field); see figures.curve_panels."""

        def points(log, event, name):
            found = [(x["epoch"], x[name]) for x in log if x["event"] == event and name in x]
            return np.array(found, float).reshape(-1, 2).T

        out = {}
        for key in keys:
            runs = [{k: points(r.log, *v) for k, v in fields.items()} for r in self.main(key)]
            if any(v.size for r in runs for v in r.values()):
                out[key[1]] = {"label": pretrained(key[1]) if key[0] == "pretrain" else label_of(key), "runs": runs}
        return out

    def learning(self) -> None:
        fields = {"training cross-entropy": ("train", "loss"), "validation cross-entropy": ("val", "loss")}
        fields["validation IoU"] = ("val", "iou")
        sets = {"curves": [ANIMAL, HALF, SUPERVISED, RESNET], "distribution": [ANIMAL, NON_ANIMAL, MIXED, PETS, ALL]}
        self.add("## Learning curves and examples")
        for name, keys in sets.items():
            if curves := self.curves(keys, fields):
                self.figure(name, figures.curve_panels, dict.fromkeys(fields), curves)
        keys = [("pretrain", a) for a in PRETRAINED]
        fields = {f"loss on {k.replace('_', '-')} images": ("val", f"loss_{k}") for k in ("animal", "non_animal")}
        if curves := self.curves(keys, fields):
            zero = next(r.metrics.get("predict_zero", {}) for k in keys for r in self.main(k))
            panels = dict(zip(fields, map(zero.get, ("animal", "non_animal")), strict=True))
            self.figure("pretraining", figures.curve_panels, panels, curves)

    def examples(self) -> None:
        def arrays(keys, name):
            paths = [(k, self.study.path / r.name / name) for k in keys for r in self.main(k)[:1]]
            return [(k, load_npz(p)) for k, p in paths if p.exists()]

        parts = ("masked", "reconstruction", "original")
        blocks = arrays([("pretrain", a) for a in PRETRAINED], "reconstruction.npz")
        if blocks:
            rows = [(p, found[p]) for _, found in blocks for p in parts]
            rows[::3] = [(f"{pretrained(k[1])}:\nmasked", found["masked"]) for k, found in blocks]
            self.figure("reconstruction", figures.image_grid, rows, 3)
        panels = arrays(ARMS, "panels.npz")
        panels = [(k, p) for k, p in panels if list(p["ids"]) == list(panels[0][1]["ids"])]
        if panels:
            first, colours = panels[0][1], figures.MASK_COLOURS
            rows = [("image", first["images"]), ("ground truth", colours[first["truth"]])]
            rows += [(label_of(k), colours[p["pred"]]) for k, p in panels]
            self.figure("masks", figures.image_grid, rows, 0, CLASSES, ids=", ".join(map(str, first["ids"])))

    def sweep(self, stage: str, mark: str) -> dict[float, tuple]:
        """Arms of a sweep with a usable run: the number after `mark` in their name -> arm."""
        keys = [(s, a) for s, a in self.study.groups if s == stage and a.startswith(mark) and self.main((s, a))]
        return {float(a.removeprefix(mark)): (s, a) for s, a in keys}

    def doses(self) -> None:
        keys = self.sweep("finetune", "dose_")
        example = self.main(next(iter(keys.values())))[0] if keys else None
        for share, key in {
            0.0: NON_ANIMAL,
            0.5: MIXED,
            1.0: ANIMAL,
        }.items():  # the study's own arms, where they are equal
            if example and self.main(key) and self.study.matches(self.main(key)[0], example):
                keys.setdefault(share, key)
        if example:
            points = self.points("", keys)
            self.add("## Share of animals in pre-training")
            self.figure("dose", figures.bands, {"dose": points}, "animal images in pre-training (%)")
            self.table("dose", points, ("arm", "values"))

    def labels(self) -> None:
        lines = {}
        for arm in (*PRETRAINED, "mae"):
            stage = "baseline" if arm == "mae" else "finetune"
            keys, full = self.sweep(stage, f"{arm}_labels_"), self.main((stage, arm))
            if not keys:
                continue
            if full and self.study.matches(full[0], self.main(next(iter(keys.values())))[0]):
                keys[1.0] = full[0].key
            lines[arm] = self.points(pretrained(arm), keys)
        if lines:
            self.add("## Share of labels in fine-tuning")
            self.figure("labels", figures.bands, lines, "labelled training images (%)", log=True)
            self.table("labels", [p for points in lines.values() for p in points], ("values",))

    def points(self, arm: str, keys: dict[float, tuple]) -> list[dict]:
        found = [(share, self.main(keys[share])) for share in sorted(keys) if self.main(keys[share])]
        return [{"arm": arm, "share": round(100 * share, 6), "seeds": len(runs), "iou": estimates(runs)["iou"],
                 "values": [r.iou() for r in runs]} for share, runs in found]  # fmt: skip

    def pretraining_loss(self) -> None:
        points = []
        arms = [k for k in self.study.groups if k[0] == "finetune" and "_labels_" not in k[1] and k != HALF]
        for run in (r for k in arms for r in self.main(k)):
            parent = self.study.pretraining(run)
            if parent and not parent.problem:
                losses = {k: parent.metrics["last"][k] for k in ("loss_animal", "loss_non_animal")}
                points.append(
                    {"arm": run.arm, "label": pretrained(run.arm), "seed": run.seed, **losses, "iou": run.iou()}
                )
        if len(points) > 2:
            x = np.array([[p[k] for k in ("loss_animal", "loss_non_animal", "iou")] for p in points])
            x -= x.mean(0)
            r = ratio(x[:, :2].T @ x[:, 2], np.sqrt((x[:, :2] ** 2).sum(0) * (x[:, 2] ** 2).sum()))
            self.add("## Pre-training loss and what comes of it")
            text = f"Pearson's r: {r[0]:.2f} (animal images), {r[1]:.2f} (others) over {len(points)} runs, not independent."
            text = text if len(points) > 5 else "Too few runs for a correlation."
            self.figure("scatter", figures.scatter, points, correlation=text)
            self.table("pretraining", points)

    def appendix(self) -> None:
        rows = []
        for r in self.study.runs:
            m, c, hardware = r.metrics, r.config, r.config.get("hardware", {})
            row = {
                "run": r.name,
                "state": r.problem or "finished",
                "stage": r.stage,
                "minutes": m.get("seconds", 0) / 60,
            }
            row |= {k: m.get(k) for k in ("img_s", "mem_gb")} | {"mfu": 100 * m["mfu"] if m.get("mfu") else None}
            row["hardware"] = f"{hardware.get('world_size')} × {hardware.get('device')}, {c.get('precision')}"
            row |= {"versions": ", ".join(f"{k} {v}" for k, v in c.get("versions", {}).items()), "git": c.get("git")}
            rows.append(row | {"manifest": c.get("manifest", {}).get("train", {}).get("sha256", "")[:12]})
        kinds = {f"{r['hardware']}, {r['versions']}, git {r['git']}" for r in rows if r["versions"]}
        minutes = {k: sum(r["minutes"] for r in rows if k in ("all", r["stage"])) for k in ("all", "pretrain")}
        self.add("## Appendix: stages")
        self.text("stages", minutes=minutes, environments="; ".join(sorted(kinds)))
        self.table("stages", rows)
        keys = [k for k in (("pretrain", "animal"), ANIMAL, SUPERVISED, RESNET) if self.main(k)]
        columns = {"_".join(k): self.main(k)[0].config["args"] for k in keys}
        settings = [
            {"setting": f} | {k: "–" if v.get(f) is None else str(v[f]) for k, v in columns.items()} for f in FLAGS
        ]
        self.add("## Appendix: settings", TEXTS["settings"])
        self.table("settings", settings)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("report.py", description="Tables, statistics and figures of a study")
    parser.add_argument("study", help="folder that run_all.sh wrote, with study.tsv")
    parser.add_argument("--output", help="folder to write to (default: report in the study's folder)")
    parser.add_argument("--title", help="title in place of the default; the data's name is added")
    return parser


def main(args: argparse.Namespace) -> None:
    study = Study(Path(args.study))
    out = Path(args.output) if args.output else study.path / "report"
    Report(study, out, args.title).write()
    print(f"{out / 'report.md'}: {sum(not r.problem for r in study.runs)} of {len(study.runs)} runs")
    for note in study.notes:
        print(f"  {note}")


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
