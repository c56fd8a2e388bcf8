"""Make the report of a study from its records and logs alone: tables (Markdown, CSV, JSON), statistics and figures.

    python report.py runs/study                    # writes report.md and report.html into runs/study/report in seconds
    python report.py runs/study --title "Batch 64" --output /tmp/report

Needs study.tsv and the run folders without their checkpoints; neither images nor a GPU, and no torch. A missing, unfinished
or deviating run is named in the report and left out of averages. report.html has the same content as report.md in one file,
with its pictures inside. Ends with exit code 2 for a folder that is no study or an --output that is no folder, and with 1
where nothing can be written.

The sections on segmentation stand in results.py; here are those that any objective and any task have.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import audit
import figures
import label_pretraining
import objective_sweep
import probe_results
import results
from arms import ANIMAL, ARMS, OWN, PRETRAIN_ANIMAL, PRETRAIN_OWN, RESNET, SUPERVISED, ArmKey
from blocks import literal
from comparisons import FEWEST_SEEDS, Comparison, columns_of_test, estimates, planned
from groups import Study, StudyError
from power import how_many_seeds, paper_difference, verdict_lines
from records import MAE, SEGMENT, RunRecord
from study import PlanParser, one_line
from summary import summary_lines
from tables import Column, Page, show

FULL_SIZE = {("mae_base", 224), ("resnet50", 224)}  # anything else is a demo
SHORT_HASH = 12

# What a report may have written, to be removed before the next one.
TABLES = (
    "table2",
    "differences",
    "image_bootstrap",
    "seeds",
    "seeds_factors",
    "audit",
    "audit_seeds",
    "printed",
    "printed_differences",
    "arms",
    "metrics",
    "validation",
    "dose",
    "dose_slope",
    "labels",
    "label_pretraining",
    "label_differences",
    "labels_slope",
    "sizes",
    "sizes_slope",
    "objectives",
    "objective_differences",
    "objective_scores",
    "pretraining",
    "probes",
    "probe_differences",
    "stages",
    "settings",
)
FIGURES = (
    "forest",
    "audit",
    "curves",
    "distribution",
    "pretraining",
    "reconstruction",
    "masks",
    "dose",
    "labels",
    "label_pretraining",
    "sizes",
    "objectives",
    "scatter",
    "probes",
)
FURTHER = ("task_*.csv", "task_*.json", "task_*.png", "pretraining_*.png")

DEMO_TEXT = (
    "**This is a demo.** It shows that everything works; its small model, small input or drawn photos answer nothing."
)
SAME_TEXT = (
    "Data sizes, model, resolution and epochs are the paper's; where it gives no optimiser settings they are ours."
)


# ----------------------------------------------------------------------------------------------------------------------
# The report


class OutputError(ValueError):
    """An output that is no folder."""


def write_report(study: Study, folder: Path, title: str | None = None) -> list[Comparison]:
    """Write report.md, report.html and their tables and figures into a folder; return the planned comparisons.

    Raises OutputError where the folder's name is that of a file, OSError where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"{folder} is no folder, or lies below a file; name a folder with --output") from None
    remove_old(folder)
    page = Page(folder)
    tasks = study.kinds(pretraining=False)
    segmentation = SEGMENT in tasks or not tasks
    comparisons = planned(study, SEGMENT) if segmentation else []
    found = results.read_results(study, comparisons) if segmentation else None
    main_task = SEGMENT if segmentation else tasks[0]
    on_labels = label_pretraining.read_sweep(study, main_task)
    objectives = objective_sweep.read_sweep(study, main_task)
    probed = probe_results.read_probes(study)

    masks_first = opening(study, page, title or default_title(tasks), found)
    if found:
        page.add(protocol_text(study))
    page.items(audit.remarks(study))
    runs_that_differ(study, page)
    if found:
        results.table_2(study, page, found)
        results.differences(page, comparisons)
        if comparisons:
            page.add("## How many seeds a difference takes")
            how_many_seeds(page, "seeds", comparisons, paper_difference())
        audit.choice_effects(study, page)
        audit.printed_scores(study, page)
    for task in tasks:
        if task != SEGMENT:
            task_section(study, page, task)
    what_arms_saw(study, page)
    if found:
        results.all_metrics(study, page)
    page.add("## Learning curves and examples")
    if found:
        results.learning_curves(study, page)
    pretraining_curves(study, page)
    if masks_first:
        reconstructions(study, page)
    if found:
        results.doses(page, found.doses)
        results.shares(page, found.labels, results.LABEL_SHARES)
        results.shares(page, found.sizes, results.IMAGE_SHARES)
    objective_sweep.section(study, page, objectives)
    label_pretraining.section(study, page, on_labels)
    if found:
        results.pretraining_scores(study, page)
    probe_results.probes(page, probed)
    stages(study, page)
    settings(study, page)
    page.write("report")
    return comparisons


def opening(study: Study, page: Page, title: str, found: results.SegmentationResults | None) -> bool:
    """Write title, headline and the most telling picture: masks, or else reconstructions. Return whether masks."""
    data = literal(data_title(study))
    counts = data_counts(study)
    demo = is_demo(study, data)
    words = f"# {literal(title)}: {data}"
    if counts:
        words += f", {counts}"
    page.add(f"{words} (demo)" if demo else words)
    if demo:
        page.note(DEMO_TEXT)
    if found:
        page.add(f"**{results.headline(data, found)}**")
        page.items(results.verdicts(found.comparisons))
        if study.panels:
            results.masks(study, page)
            return True
    reconstructions(study, page)
    return False


def remove_old(folder: Path) -> None:
    """Remove the tables and figures of an earlier report."""
    names = [f"{table}.{end}" for table in TABLES for end in ("csv", "json")]
    names += [f"{figure}.png" for figure in FIGURES]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for pattern in FURTHER:
        for path in folder.glob(pattern):
            path.unlink()


def default_title(tasks: list[str]) -> str:
    """Name the study after its tasks."""
    names = ["segmentation" if task == SEGMENT else task for task in tasks or [SEGMENT]]
    return f"Pre-training images and {', '.join(names)} after fine-tuning"


def data_title(study: Study) -> str:
    """Name the data sets, as the runs recorded them: those of pre-training first."""
    titles = [run.config["data"]["title"] for run in study.runs if "data" in run.config]
    return " and ".join(dict.fromkeys(titles)) or "unknown data"


def data_counts(study: Study) -> str:
    """Count the training images of both stages, where their lists were recorded; empty where none was."""
    parts = []
    pretrained = recorded_entries(study, pretraining=True)
    if pretrained is not None:
        parts.append(f"{pretrained:,} pre-training entries")
    labelled = recorded_entries(study, pretraining=False)
    if labelled is not None:
        segmentation = SEGMENT in study.kinds(pretraining=False)
        parts.append(f"{labelled:,} labelled {'pets' if segmentation else 'images'}")
    return ", ".join(parts)


def recorded_entries(study: Study, pretraining: bool) -> int | None:
    """Return the length of the longest recorded training list of a stage, outside sweeps; None where there is none."""
    lengths = []
    for run in study.runs:
        train = run.config.get("manifest", {}).get("train", {})
        if (run.stage == "pretrain") == pretraining and not run.arm.sweep and "entries" in train:
            lengths.append(train["entries"])
    return max(lengths, default=None)


def is_demo(study: Study, data: str) -> bool:
    """Check whether any run is smaller than the study's networks and images, or the photos are drawn."""
    sizes = {(run.config["args"].get("model"), run.config["args"].get("img_size")) for run in study.runs if run.config}
    return "demo" in data or bool(sizes - FULL_SIZE)


def protocol_text(study: Study) -> str:
    """List where this study differs from the paper's protocol, from the recorded settings."""
    found = []
    for key, arm in ARMS.items():
        runs = [run for run in study.runs if run.key == key and run.config]
        if not arm.protocol or not runs:
            continue
        config = runs[0].config
        have = {name: config["args"].get(name) for name in ("model", "img_size", "epochs")}
        have["images"] = config["n_train"]
        changes = []
        for name, paper in arm.protocol._asdict().items():
            if paper is not None and paper != have[name]:
                changes.append(f"{name} {show(have[name])} ({show(paper)})")
        if changes:
            found.append(f"{arm.label}: {', '.join(changes)}")
    if not found:
        return audit.ORIGINAL_SETTINGS if audit.is_original(study) else SAME_TEXT
    return (
        "The paper's numbers stand beside ours as context only, because the protocol differs (in parentheses the "
        f"paper's): {'; '.join(found)}."
    )


def runs_that_differ(study: Study, page: Page) -> None:
    """List what is missing or differs, or say that nothing does."""
    if study.notes:
        page.add("## Runs that are missing or differ")
        page.items(study.notes)
        return
    text = f"All {len(study.runs)} runs finished, with equal settings where averaged or compared"
    if results.resnet_remark(study):
        text += ", but for the schedule of ResNet-50"
    page.add(f"{text}.")


ARM_COLUMNS = [
    Column("arm"),
    Column("images", "list entries"),
    Column("unique", "distinct images"),
    Column("animals", "with animals"),
    Column("epochs"),
    Column("updates"),
    Column("batch"),
    Column("before", "updates of pre-training"),
]


def what_arms_saw(study: Study, page: Page) -> None:
    """Show how many images, epochs and updates each arm had."""
    rows = []
    for key, arm in study.arms.items():
        runs = study.main(key)
        if not runs:
            continue
        config = runs[0].config
        before = study.before(runs[0])
        rows.append(
            {
                "arm": arm.label,
                "images": runs[0].metrics.get("n_train", config["n_train"]),
                "unique": runs[0].metrics.get("n_unique", config["n_unique"]),
                "updates": config["updates"],
                "epochs": config["args"].get("epochs"),
                "batch": config.get("batch_size"),
                "animals": config.get("manifest", {}).get("train", {}).get("animal_images"),
                "before": sum(run.config.get("updates", 0) for run in before) or None,
            }
        )
    if rows:
        page.add("## What each arm was trained on")
        page.table("arms", rows, ARM_COLUMNS)
        page.add(results.resnet_remark(study))
    page.add(results.half_remark(study))


# ----------------------------------------------------------------------------------------------------------------------
# Any task


TASK_TEXT = (
    "Intervals: 95 %, Student's t over seeds; with one seed the bootstrap over test images, which knows nothing of how "
    "another seed would come out."
)


def task_section(study: Study, page: Page, task: str) -> None:
    """Show the test scores of a task other than segmentation, and its planned differences."""
    page.add(f"## Task: {task}")
    rows = []
    columns = [Column("arm"), Column("seeds")]
    for key, arm in study.arms.items():
        runs = study.main_of(key, task)
        if not runs:
            continue
        rows.append({"arm": arm.label, "seeds": len(runs), **estimates(runs), "note": study.left_out(key)})
        words = runs[0].config["scores"]
        columns = [Column("arm"), Column("seeds")]
        columns += [Column(name, words.get(name, name)) for name in runs[0].table().names]
    if not rows:
        page.add("No arm has been trained and tested yet.")
        return
    page.add(f"Test images, {kept_weights(study, task)}. {TASK_TEXT}")
    rows += reference_rows(study, task)
    page.table(f"task_{task}", rows, [*columns, Column("note")])
    task_curves(study, page, task)
    comparisons = [comparison for comparison in planned(study, task) if comparison.values]
    if comparisons:
        task_differences(page, task, comparisons)
        page.add("### How many seeds a difference takes")
        how_many_seeds(page, f"task_{task}_seeds", comparisons)


def reference_rows(study: Study, task: str) -> list[dict]:
    """Score what looks at no image, as the first tested run of a task recorded it."""
    for run in study.runs:
        if run.kind == task and not run.problem and "reference_numerators" in run.test:
            guess = replace(run, test={**run.test, "numerators": run.test["reference_numerators"]})
            return [{"arm": literal(str(run.test["reference_name"])), **estimates([guess])}]
    return []


def kept_weights(study: Study, task: str) -> str:
    """Describe which weights a task was tested with."""
    config = next(run.config for run in study.runs if run.kind == task)
    select = config.get("select")
    if select is None:
        return "weights of the last epoch"
    return f"weights of the best validation {config['scores'].get(select, select)}"


def task_differences(page: Page, task: str, comparisons: list[Comparison]) -> None:
    """Show the planned differences of the score that selects weights."""
    page.add(
        f"Planned differences of `{comparisons[0].score}` in hundredths, paired by seed. p: paired t-test over seeds, "
        f"Holm-corrected over the tested rows, from {FEWEST_SEEDS} seeds on, under the same conditions as for segmentation. "
        "No margin is set within which arms would count as equivalent."
    )
    tested = any(comparison.tested for comparison in comparisons)
    if tested:
        page.items(verdict_lines(comparisons))
    rows = []
    for comparison in comparisons:
        each = []
        for value, image in zip(comparison.values, comparison.images, strict=True):
            each.append(image._replace(value=value).points(2))
        row = {"label": comparison.label, "each": ", ".join(each), "mean": comparison.mean}
        if tested:
            row |= columns_of_test(comparison)
        row["reason"] = comparison.reason
        rows.append(row)
    columns = [
        Column("label", "difference"),
        Column("each", "per seed [95 % bootstrap over test images]"),
        Column("mean", "mean [95 % t-interval]", 2),
        Column("holm", "p (Holm)"),
        Column("detectable", "could have shown", 2),
        Column("verdict"),
        Column("reason", "not tested because"),
    ]
    page.table(f"task_{task}_differences", rows, columns)


def task_curves(study: Study, page: Page, task: str) -> None:
    """Draw the training loss and the validation scores of a task."""
    keys = [key for key, arm in study.arms.items() if not arm.sweep and study.main_of(key, task)]
    if not keys:
        return
    panels = [figures.Panel("training loss", "train", "loss")]
    for score, words in study.main(keys[0])[0].config["scores"].items():
        panels.append(figures.Panel(f"validation {words}", "val", score))
    curves = [curve(study, key, study.arms[key].label) for key in keys]
    curves = [found for found in curves if found.logs]
    if curves:
        caption = f"Loss and scores of {task} against the epoch; {results.seeds_in_curves(study)}."
        page.figure(f"task_{task}_curves", caption, figures.curve_panels, panels, curves)


# ----------------------------------------------------------------------------------------------------------------------
# Any objective


def curve(study: Study, key: ArmKey, label: str) -> figures.Curve:
    """Collect the logs of an arm for a figure."""
    logs = [run.log for run in study.main(key) if run.log]
    return figures.Curve(label, study.arms[key].style, logs)


def pretraining_curves(study: Study, page: Page) -> None:
    """Draw the validation scores of each objective that pre-training has."""
    for kind in study.kinds(pretraining=True):
        keys = [key for key, arm in study.arms.items() if key.stage == "pretrain" and not arm.sweep]
        keys = [key for key in keys if study.main_of(key, kind)]
        curves = [curve(study, key, study.arms[key].images) for key in keys]
        curves = [found for found in curves if found.logs]
        if not curves:
            continue
        panels = objective_panels(study.main(keys[0])[0])
        seeds = results.seeds_in_curves(study)
        if kind == MAE:
            caption = (
                "Pre-training: loss on fixed masks of the same validation images for all arms; dashed: predicting zero"
            )
        else:
            caption = f"Pre-training ({kind}): scores of the same validation images for all arms"
        name = "pretraining" if kind == MAE else f"pretraining_{kind}"
        page.figure(name, f"{caption}; {seeds}.", figures.curve_panels, panels, curves)


def objective_panels(run: RunRecord) -> list[figures.Panel]:
    """Make a panel for each validation score, with the heights of trivial predictors where the run recorded them."""
    panels = []
    for score, words in run.config["scores"].items():
        panels.append(figures.Panel(words, "val", score, run.trivial(score)))
    return panels


def reconstructions(study: Study, page: Page) -> None:
    """Show masked input, reconstruction and original of the same images after each pre-training."""
    rows = []
    for pictures in study.reconstructions:
        arrays = pictures.arrays
        rows.append(figures.ImageRow(f"{pictures.arm.images}:\nmasked", arrays["masked"]))
        rows.append(figures.ImageRow("reconstruction", arrays["reconstruction"]))
        rows.append(figures.ImageRow("original", arrays["original"]))
    if rows:
        caption = (
            "Masked input, reconstruction and original of fixed validation images, one block per pre-training (the "
            "paper's Fig. 2)"
        )
        if not study.main(PRETRAIN_OWN):
            caption += "; left half: animal images, right half: others"
        caption += "."
        page.figure("reconstruction", caption, figures.image_grid, rows, block=3)


# ----------------------------------------------------------------------------------------------------------------------
# Appendix

STAGE_COLUMNS = [
    Column("run"),
    Column("state"),
    Column("minutes", "minutes", 1),
    Column("img_s", "images/s", 0),
    Column("mfu", "MFU (%)", 1),
    Column("mem_gb", "memory (GiB)", 1),
    Column("manifest", "SHA-256 of the image list"),
]


def stage_row(run: RunRecord) -> dict:
    """Describe how a run was computed."""
    metrics = run.metrics
    config = run.config
    hardware = config.get("hardware", {})
    mfu = metrics.get("mfu")
    return {
        "run": run.name,
        "state": run.problem or "finished",
        "stage": run.stage,
        "img_s": metrics.get("img_s"),
        "minutes": metrics.get("seconds", 0) / 60,
        "mem_gb": metrics.get("mem_gb"),
        "mfu": 100 * mfu if mfu else None,
        "hardware": f"{hardware.get('world_size')} × {hardware.get('device')}, {config.get('precision')}",
        "versions": ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items()),
        "git": config.get("git"),
        "manifest": config.get("manifest", {}).get("train", {}).get("sha256", "")[:SHORT_HASH],
    }


def stages(study: Study, page: Page) -> None:
    """Show state, time and environment of each run."""
    rows = [stage_row(run) for run in study.runs]
    total = sum(row["minutes"] for row in rows)
    before = sum(row["minutes"] for row in rows if row["stage"] == "pretrain")
    environments = {f"{row['hardware']}, {row['versions']}, git {row['git']}" for row in rows if row["versions"]}
    page.add(
        "## Appendix: stages",
        f"Training time of all runs: {total:.1f} minutes, of which pre-training {before:.1f}. "
        f"Environments: {'; '.join(sorted(environments))}.",
    )
    page.table("stages", rows, STAGE_COLUMNS)


SETTINGS_TEXT = (
    "The paper gives epochs, input size, model and mask ratio and points to facebookresearch/mae for the rest. Rates, batch "
    "sizes, decay, warm-up, crops, layer decay and drop path are ours, from common practice, untuned unless said otherwise."
)


def settings(study: Study, page: Page) -> None:
    """Show the flags that make up the recipe of each kind of training."""
    flags: dict[str, None] = {}
    columns = [Column("setting")]
    chosen: list[tuple[str, dict]] = []
    for key in (PRETRAIN_ANIMAL, PRETRAIN_OWN, ANIMAL, OWN, SUPERVISED, RESNET):
        for run in study.main(key)[:1]:
            title = run.arm.title
            columns.append(Column(title))
            chosen.append((title, run.config["args"]))
            roles = run.config["roles"]
            flags.update(dict.fromkeys(flag for flag in run.config["args"] if roles.get(flag) in ("recipe", "network")))
    rows = []
    for flag in flags:
        row = {"setting": flag}
        for title, args in chosen:
            value = args.get(flag)
            row[title] = "–" if value is None else str(value)
        rows.append(row)
    text = audit.ORIGINAL_SETTINGS if audit.is_original(study) else SETTINGS_TEXT
    page.add("## Appendix: settings", text)
    page.table("settings", rows, columns)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = PlanParser("report.py", allow_abbrev=False, description="Tables, statistics and figures of a study")
    parser.add_argument("study", help="folder that run_all.sh wrote, with study.tsv")
    parser.add_argument("--output", help="folder to write to (default: report in the study's folder)")
    parser.add_argument("--title", help="title in place of the default; the data's name is added")
    parser.add_argument("--quiet", action="store_true", help="print the path of report.html and nothing else")
    return parser


def main(args: argparse.Namespace) -> None:
    """Read the study, write its report, name the runs that are missing or differ, and show the main numbers."""
    study = Study(Path(args.study))
    folder = Path(args.output) if args.output else study.path / "report"
    comparisons = write_report(study, folder, args.title)
    if args.quiet:
        print(folder / "report.html")
        return
    for note in study.notes:
        print(f"  {note}")
    for line in summary_lines(study, comparisons):
        print(line)
    usable = sum(not run.problem for run in study.runs)
    print(f"{folder / 'report.md'}: {usable} of {len(study.runs)} runs")
    print(f"{folder / 'report.html'}: the same in one file, for any browser")


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (StudyError, OutputError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of this output has gone; the report is complete
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(
            f"error: the report cannot be written: {one_line(error)}; name another folder with --output",
            file=sys.stderr,
        )
        sys.exit(1)
