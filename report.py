"""Make the report of a study from its records and logs alone: tables (Markdown, CSV, JSON), statistics and figures.

    python report.py runs/study                    # writes runs/study/report/report.md in seconds
    python report.py runs/study --title "Batch 64" --output /tmp/report

Needs study.tsv and the run folders without their checkpoints; neither images nor a GPU, and no torch. A missing, unfinished
or deviating run is named in the report and left out of averages. Ends with exit code 2 for a folder that is no study.
"""

import argparse
import csv
import json
import math
import re
import sys
from pathlib import Path

import figures
from metrics import CLASSES, scores, t_interval
from study import ARMS, MARGIN, PRETRAINED, Estimate, Study, StudyError, estimates, label_of, planned, pretrained

RESNET, SUPERVISED, ANIMAL, HALF, NON_ANIMAL, MIXED, PETS, ALL = ARMS
REFERENCES = {
    "stride32": "best score a stride-32 output could reach", "all_animal": "trivial: all animal",
    "all_background": "trivial: all background", "mean_mask": "trivial: mean training mask",
}  # fmt: skip
PAPER = {  # model, input size, epochs and images of the paper's protocol
    ("pretrain", "animal"): ("mae_base", 224, 150, 25_739), ("pretrain", "mixed"): ("mae_base", 224, 150, 25_918),
    ANIMAL: ("mae_base", 224, 100, 5_144), RESNET: ("resnet50", 224, 100, None),
}  # fmt: skip
FLAGS = ("epochs", "batch_size", "blr", "weight_decay", "warmup_epochs", "min_lr", "layer_decay", "drop_path",
         "crop_scale", "flips", "clip_grad", "mask_ratio", "norm_pix_loss", "cache_size", "img_size", "model")  # fmt: skip
FIGURES = ("forest", "curves", "distribution", "pretraining", "reconstruction", "masks", "dose", "labels", "scatter")
PARAGRAPHS = [p.split(": ", 1) for p in Path(__file__).with_suffix(".txt").read_text().split("\n\n")[1:]]
TEXTS = {name: " ".join(words.split()) for name, words in PARAGRAPHS}
TABLES = {k.removeprefix("table "): v for k, v in TEXTS.items() if k.startswith("table ")}


def show(value, digits: int = 3, brief: bool = False) -> str:
    """Format a table cell; `brief` gives the half width of an interval in place of its limits."""
    if isinstance(value, Estimate):
        middle, low, high = (f"{v:.{digits}f}" for v in value)
        ends = f" ±{(value.high - value.low) / 2:.{digits}f}" if brief else f" [{low}, {high}]"
        return middle if math.isnan(value.low) else middle + ends
    if value in (None, "") or value != value:
        return "–"
    number = f".{digits}f" if isinstance(value, float) else ","
    return format(value, number) if isinstance(value, (int, float)) else str(value).replace("|", "/")


def markdown(rows: list[dict], columns: str, brief: bool = False) -> str:
    """Draw rows as a table with the columns of TABLES' notation; a column that no row has is left out."""
    specs = [re.fullmatch(r"(\w+)=?([^:]*):?(\d*)", column).groups() for column in columns.split(" | ")]
    specs = [spec for spec in specs if any(spec[0] in row for row in rows)]
    lines = [[head or key for key, head, _ in specs], ["---"] * len(specs)]
    lines += [[show(row.get(key), int(digits or 3), brief) for key, _, digits in specs] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(out: Path, name: str, rows: list[dict]) -> None:
    """Write rows as CSV and JSON with every digit; an interval becomes two more columns."""
    flat = []
    for row in rows:
        cells = {k: v.value if isinstance(v, Estimate) else v for k, v in row.items()}
        for k, v in ((k, v) for k, v in row.items() if isinstance(v, Estimate)):
            cells |= {f"{k}_low": v.low, f"{k}_high": v.high}
        flat.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in cells.items()})
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
        models = {(c["args"].get("model"), c["args"].get("img_size")) for c in configs}
        self.data = next((c["data"]["title"] for c in configs if "data" in c), "unknown data")
        self.demo = "demo" in self.data or bool(models - {("mae_base", 224), ("resnet50", 224)})
        self.title = f"{title or 'Pre-training images and segmentation after fine-tuning'}: {self.data}"
        self.seeds = "thin: seeds, thick: their mean" if len({r.seed for r in study.runs}) > 1 else "one seed"
        self.rows = planned(study)
        self.dose_points = self.sweep("finetune", "dose_", {0.0: NON_ANIMAL, 0.5: MIXED, 1.0: ANIMAL})
        stages = {arm: "baseline" if arm == "mae" else "finetune" for arm in PRETRAINED}
        lines = {arm: self.sweep(stage, f"{arm}_labels_", {1.0: (stage, arm)}) for arm, stage in stages.items()}
        self.label_lines = {arm: points for arm, points in lines.items() if points}

    def add(self, *blocks: str) -> None:
        self.parts += [b.rstrip() + "\n" for b in blocks if b]

    def figure(self, name: str, draw, *args, **values) -> None:
        """Draw a figure and add it with its caption, filled with values."""
        self.count += 1
        draw(self.out / f"{name}.png", *args)
        caption = TEXTS[name].format(margin=MARGIN, seeds=self.seeds, **values)
        self.add(f"![Figure {self.count}]({name}.png)", f"*Figure {self.count}. {caption}*")

    def table(self, name: str, rows: list[dict], hidden: tuple = ()) -> None:
        rows = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
        write_table(self.out, name, rows)
        self.add(markdown(rows, TABLES[name]))

    def write(self) -> None:
        """Collect all sections and write report.md."""
        table, protocol, notes = self.table2(), "; ".join(self.protocol()), self.study.notes
        self.add(f"# {self.title}{' (demo)' * self.demo}", TEXTS["demo"] * self.demo, f"**{self.headline(table)}**")
        self.add(TEXTS["differs" if protocol else "same"].format(what=protocol))
        fine = TEXTS["finished"].format(n=len(self.study.runs), but=TEXTS["but"] if self.resnet_epochs() else "")
        listed = "\n".join(f"- {note}" for note in notes)
        self.add(f"## Runs that are missing or differ\n\n{listed}" if notes else fine)
        self.add("## Results beside the paper's Table 2", TEXTS["table2"])
        self.table("table2", table)
        for section in (self.differences, self.arms, self.all_metrics, self.learning, self.examples, self.doses,
                        self.labels, self.pretraining_loss, self.appendix):  # fmt: skip
            section()
        (self.out / "report.md").write_text("\n".join(self.parts))

    def protocol(self) -> list[str]:
        """Say where this study differs from the paper's protocol, from the recorded settings."""
        found = []
        for key, paper in PAPER.items():
            for c in [r.config for r in self.study.runs if r.key == key and r.config][:1]:
                have = {k: c["args"].get(k) for k in ("model", "img_size", "epochs")} | {"images": c["n_train"]}
                pairs = [(k, a, b) for (k, a), b in zip(have.items(), paper, strict=True) if b not in (a, None)]
                what = ", ".join(f"{k} {show(a)} ({show(b)})" for k, a, b in pairs)
                found += [f"{label_of(key)}: {what}"] * bool(pairs)
        return found

    def table2(self) -> list[dict]:
        """Score all arms, the limit of a stride-32 output below ResNet-50, and predictors that look at no image."""
        rows, references = [], []
        for name, label in REFERENCES.items():
            for counts in [v for k, v in self.study.reference.items() if k == f"counts_{name}"]:
                s = {k: float(v) for k, v in scores(counts.sum(0)).items()}
                row = {"arm": label, "iou": s["iou"], "accuracy": 100 * s["accuracy"], "miou": s["miou"]}
                references.append(row | {"reference": name})
        for key, (label, paper) in ARMS.items():
            groups = self.study.groups.get(key)
            for i, runs in enumerate(groups or [[]] if paper or groups is not None else []):
                row = {"arm": label + (f" (seed {runs[0].seed}: other settings)" if i else ""), "seeds": len(runs)}
                if runs:
                    found = estimates(runs)
                    row |= {k: found[k] for k in ("loss", "iou", "miou")} | {"accuracy": found["accuracy"].times(100)}
                    row["interval"] = "t over seeds" if len(runs) > 1 else "bootstrap over images"
                if paper and not i:
                    row |= zip(("paper_loss", "paper_iou", "paper_accuracy"), paper, strict=True)
                row["note"] = "not part of this study" if groups is None else "" if i else self.study.left_out(key)
                rows.append(row)
            rows += [r for r in references if key == RESNET and r["reference"] == "stride32"]
        return rows + [r for r in references if r["reference"] != "stride32"]

    def headline(self, table: list[dict]) -> str:
        """Say in a sentence what was found, no more strongly than the seeds allow."""
        arms = sorted((r for r in table if isinstance(r.get("iou"), Estimate)), key=lambda r: r["iou"].value)
        if not arms:
            return "No arm has been trained and tested yet."
        low, high = (f"{r['iou'].value:.3f} ({r['arm']})" for r in (arms[0], arms[-1]))
        trivial = [r["iou"] for r in table if r["arm"].startswith("trivial")]
        best = f"; the best trivial predictor has {max(trivial):.3f}" if trivial else ""
        text = f"On {self.data}, test IoU runs from {low} to {high}{best}."
        for row in (r for r in self.rows if r["pair"] == (ANIMAL, NON_ANIMAL) and r["values"]):
            m, n = row["mean"], len(row["values"])
            verdicts = {"one": n == 1, "differs": row["holm"] < 0.05, "equal": row["tost"] < 0.05,
                        "open": m.low <= 0 <= m.high, "untested": row["reason"], "unsure": True}  # fmt: skip
            verdict = TEXTS["verdict " + next(k for k, holds in verdicts.items() if holds)]
            text += f" {TEXTS['verdict']} {verdict}".format(m=m, n=n, margin=MARGIN, **row)
        return text

    def differences(self) -> None:
        if not self.rows:
            return
        single = max(len(r["values"]) for r in self.rows) < 2
        self.add("## Planned differences", TEXTS["one_seed" if single else "differences"].format(margin=MARGIN))
        shown = [r | {"each": ", ".join(f"{v:+.2f}" for v in r["values"])} for r in self.rows]
        self.table("differences", shown, ("pair", "images", "values", "seeds", *["p", "holm", "tost", "mean"] * single))
        if rows := [r for r in self.rows if r["values"]]:
            bars = [r | {"seeds": r["images"], "mean": r["mean"] if len(r["values"]) > 1 else None} for r in rows]
            self.figure("forest", figures.forest, bars, MARGIN)
            self.add(TEXTS["image_bootstrap"])
            pairs = [(r["label"], *pair) for r in rows for pair in zip(r["seeds"], r["images"], strict=True)]
            self.table("image_bootstrap", [dict(zip(("label", "seed", "difference"), p, strict=True)) for p in pairs])

    def resnet_epochs(self) -> str:
        """Say that the ResNet baseline trained for more or fewer epochs than the MAE arms; "" where it did not."""
        epochs = [r.config["args"].get("epochs") for k in (RESNET, ANIMAL) for r in self.main(k)[:1]]
        return TEXTS["resnet"].format(*epochs) if len(set(epochs)) > 1 else ""

    def arms(self) -> None:
        rows = []
        for run in (r for key in self.study.groups for r in self.main(key)[:1]):
            c, parent = run.config, self.study.pretraining(run)
            row = {"arm": label_of(run.key), "images": c["n_train"], "unique": c["n_unique"], "updates": c["updates"]}
            row |= {"epochs": c["args"].get("epochs"), "batch": c.get("batch_size")}
            row["animals"] = c.get("manifest", {}).get("train", {}).get("animal_images")
            rows.append(row | {"before": parent.config.get("updates") if parent else None})
        if rows:
            self.add("## What each arm was trained on")
            self.table("arms", rows)
            self.add(self.resnet_epochs())
        if self.main(HALF) and self.main(ANIMAL):
            self.add(TEXTS["half"].format(a=self.main(HALF)[0].config, b=self.main(ANIMAL)[0].config))

    def all_metrics(self) -> None:
        rows, kept = [], []
        if not (arms := [(label_of(k), self.main(k)) for k in ARMS if self.main(k)]):
            return
        self.add("## All metrics", TEXTS["metrics"])
        for per_image, native in ((False, False), (False, True), (True, False), (True, True)):
            where = {
                "level": ("dataset", "mean over images")[per_image],
                "resolution": ("input size", "native size")[native],
            }
            part = [{"arm": k, "seeds": len(v), **estimates(v, native, per_image, 2000), **where} for k, v in arms]
            self.add(f"**{', '.join(where.values())}**", markdown(part, TABLES["metrics"], brief=True))
            rows += part
        write_table(self.out, "metrics", rows)
        for label, runs in arms:
            best, last = (Estimate(*t_interval([r.metrics[when]["iou"] for r in runs])) for when in ("best", "last"))
            epochs = ", ".join(f"{r.metrics['best']['epoch']:g}" for r in runs)
            kept.append({"arm": label, "seeds": len(runs), "best": best, "epoch": epochs, "last": last})
        self.add(TEXTS["validation"])
        self.table("validation", kept)

    def curves(self, name: str, keys: list[tuple], panels: dict[str, tuple]) -> None:
        """Draw logged curves of arms; panels: title -> (event, field, loss of predicting zero or None)."""
        arms = {k: [r.log for r in self.main(k) if r.log] for k in keys}
        arms = {k[1]: (label_of(k) if k in ARMS else pretrained(k[1]), logs) for k, logs in arms.items() if logs}
        if arms:
            self.figure(name, figures.curve_panels, panels, arms)

    def learning(self) -> None:
        self.add("## Learning curves and examples")
        panels = {"training cross-entropy": ("train", "loss", None), "validation cross-entropy": ("val", "loss", None)}
        panels["validation IoU"] = ("val", "iou", None)
        self.curves("curves", [ANIMAL, HALF, SUPERVISED, RESNET], panels)
        self.curves("distribution", [ANIMAL, NON_ANIMAL, MIXED, PETS, ALL], panels)
        keys = [("pretrain", a) for a in PRETRAINED]
        zero = next((r.metrics.get("predict_zero", {}) for k in keys for r in self.main(k)), {})
        losses = {"loss on animal images": "animal", "loss on non-animal images": "non_animal"}
        self.curves("pretraining", keys, {k: ("val", f"loss_{v}", zero.get(v)) for k, v in losses.items()})

    def examples(self) -> None:
        parts = ("masked", "reconstruction", "original")
        if blocks := self.study.reconstructions:
            heads = [(f"{pretrained(k[1])}:\n" * (p == "masked") + p, found[p]) for k, found in blocks for p in parts]
            self.figure("reconstruction", figures.image_grid, heads, 3)
        if panels := self.study.panels:
            first, colours = panels[0][1], figures.MASK_COLOURS
            rows = [("image", first["images"]), ("ground truth", colours[first["truth"]])]
            rows += [(label_of(k), colours[p["pred"]]) for k, p in panels if list(p["ids"]) == list(first["ids"])]
            self.figure("masks", figures.image_grid, rows, 0, CLASSES, ids=", ".join(map(str, first["ids"])))

    def sweep(self, stage: str, mark: str, full: dict[float, tuple]) -> list[dict]:
        """Points of a sweep: the number after `mark` in an arm's name, and the study's own arms where they are equal."""
        keys = [(s, a) for s, a in self.study.groups if s == stage and a.startswith(mark) and self.main((s, a))]
        found, matches = {float(a.removeprefix(mark)): self.main((s, a)) for s, a in keys}, self.study.matches
        firsts = [runs[0] for runs in found.values()]
        base = max(firsts, key=lambda run: sum(matches(run, other) for other in firsts), default=None)
        for share, run in [(share, runs[0]) for share, runs in found.items() if not matches(runs[0], base)]:
            self.study.notes.append(f"`{run.name}` has other settings or updates than `{base.name}`: not in its sweep")
            del found[share]
        for share, runs in ((share, self.main(key)) for share, key in full.items() if found):
            if runs and matches(runs[0], base):
                found.setdefault(share, runs)
        rows = [(pretrained(runs[0].arm.split("_labels_")[0]), share, runs) for share, runs in sorted(found.items())]
        return [{"arm": arm, "share": round(100 * share, 6), "seeds": len(runs), "iou": estimates(runs)["iou"],
                 "values": [r.iou() for r in runs]} for arm, share, runs in rows]  # fmt: skip

    def doses(self) -> None:
        if self.dose_points:
            self.add("## Share of animals in pre-training")
            self.figure("dose", figures.bands, {"dose": self.dose_points}, "animal images in pre-training (%)")
            self.table("dose", self.dose_points, ("arm", "values"))

    def labels(self) -> None:
        if self.label_lines:
            self.add("## Share of labels in fine-tuning")
            self.figure("labels", figures.bands, self.label_lines, "labelled training images (%)", True)
            self.table("labels", [p for points in self.label_lines.values() for p in points], ("values",))

    def pretraining_loss(self) -> None:
        points = []
        arms = [k for k in self.study.groups if k[0] == "finetune" and "_labels_" not in k[1] and k != HALF]
        for run in (r for k in arms for r in self.main(k)):
            parent = self.study.pretraining(run)
            if parent and not parent.problem:
                losses = {k: parent.metrics["last"][k] for k in ("loss_animal", "loss_non_animal")} | {"iou": run.iou()}
                points.append({"arm": run.arm, "label": pretrained(run.arm), "seed": run.seed, **losses})
        if len(points) > 2:
            self.add("## Pre-training loss and what comes of it")
            self.figure("scatter", figures.scatter, points)
            self.table("pretraining", points)

    def appendix(self) -> None:
        rows = []
        for r in self.study.runs:
            m, c, hardware = r.metrics, r.config, r.config.get("hardware", {})
            row = {"run": r.name, "state": r.problem or "finished", "stage": r.stage, "img_s": m.get("img_s")}
            row |= {"minutes": m.get("seconds", 0) / 60, "mem_gb": m.get("mem_gb")}
            row["mfu"] = 100 * m["mfu"] if m.get("mfu") else None
            row["hardware"] = f"{hardware.get('world_size')} × {hardware.get('device')}, {c.get('precision')}"
            row |= {"versions": ", ".join(f"{k} {v}" for k, v in c.get("versions", {}).items()), "git": c.get("git")}
            rows.append(row | {"manifest": c.get("manifest", {}).get("train", {}).get("sha256", "")[:12]})
        kinds = sorted({f"{r['hardware']}, {r['versions']}, git {r['git']}" for r in rows if r["versions"]})
        minutes = {k: sum(r["minutes"] for r in rows if k in ("all", r["stage"])) for k in ("all", "pretrain")}
        self.add("## Appendix: stages", TEXTS["stages"].format(minutes=minutes, environments="; ".join(kinds)))
        self.table("stages", rows)
        keys = [k for k in (("pretrain", "animal"), ANIMAL, SUPERVISED, RESNET) if self.main(k)]
        args = {"_".join(k): self.main(k)[0].config["args"] for k in keys}
        rows = [{"setting": f} | {k: "–" if a.get(f) is None else str(a[f]) for k, a in args.items()} for f in FLAGS]
        self.add("## Appendix: settings", TEXTS["settings"])
        self.table("settings", rows)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("report.py", description="Tables, statistics and figures of a study")
    parser.add_argument("study", help="folder that run_all.sh wrote, with study.tsv")
    parser.add_argument("--output", help="folder to write to (default: report in the study's folder)")
    parser.add_argument("--title", help="title in place of the default; the data's name is added")
    return parser


def main(args: argparse.Namespace) -> None:
    """Read the study, write its report and name the runs that are missing or differ."""
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
        sys.exit(2)
