"""The report says what the records say, names what is missing or unequal, and needs no torch, images or checkpoints."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from study_folder import ROLES, SCORES, rewrite_run, role_of, write_study

import figures
from blocks import fixed
from comparisons import Estimate
from groups import Study
from metrics import bootstrap, image_iou, image_iou_each, scores, t_interval
from report import get_args_parser, main
from study import read_lines, write_lines
from tables import show

ROOT = Path(__file__).resolve().parent.parent
DRAWING = ("forest", "curve_panels", "image_grid", "bands", "scatter")
SIX = ["ResNet-50", "Supervised MAE", "Finetuned-Animals", "Finetuned-Half", "Finetuned-Non-Animals", "Finetuned-Mixed"]


def draw_nothing(path, *_, **__):
    """Write the smallest picture in place of a figure."""
    Image.new("RGB", (1, 1)).save(path)


def run_report(study, *flags):
    return subprocess.run(
        [sys.executable, ROOT / "report.py", study, *flags],
        capture_output=True,
        text=True,
        cwd=study if study.is_dir() else ROOT,
    )


def report(study, draw=False):
    """Make the report; without drawing it takes no time."""
    if draw:
        done = run_report(study)
        assert done.returncode == 0 and not done.stderr, done.stderr
    else:
        with mock.patch.multiple(figures, **dict.fromkeys(DRAWING, draw_nothing)):
            main(get_args_parser().parse_args([str(study)]))
    return (study / "report/report.md").read_text()


def table(study, name):
    rows = json.loads((study / f"report/{name}.json").read_text())
    with open(study / f"report/{name}.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    return rows


def arm(rows, label):
    return next(r for r in rows if r["arm"] == label)


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A study of two seeds with all arms, both sweeps and the audit, with its report."""
    study = write_study(
        tmp_path_factory.mktemp("full") / "study",
        sweeps=("animal_fraction", "label_fraction"),
        extra=("pets", "all"),
        audit=True,
    )
    return study, report(study, draw=True)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("small") / "study", n=40, epochs=3)


@pytest.fixture(scope="session")
def three_seeds(tmp_path_factory):
    """A study of three seeds, with its report."""
    study = write_study(tmp_path_factory.mktemp("three") / "study", seeds=(0, 1, 2), n=40)
    return study, report(study)


@pytest.fixture
def two_seeds(small, tmp_path):
    """A fresh copy of a small study of two seeds."""
    return shutil.copytree(small, tmp_path / "study")


def test_table_2_has_the_scores_of_the_records_beside_the_papers(finished):
    study, _ = finished
    rows = table(study, "table2")
    assert [r["arm"] for r in rows if r.get("paper_iou")] == SIX
    found = arm(rows, "Finetuned-Animals")
    records = [np.load(study / f"seed{s}/finetune_animal/test.npz") for s in (0, 1)]
    for name, factor in (("iou", 1), ("accuracy", 100)):
        mean, low, high = t_interval([float(scores(r["counts"].sum(0))[name]) for r in records])
        assert [found[name], found[f"{name}_low"], found[f"{name}_high"]] == pytest.approx(
            [factor * v for v in (mean, low, high)]
        )
    assert found["loss"] == pytest.approx(np.mean([r["loss_sum"].sum() / r["pixels"].sum() for r in records]))
    assert (found["paper_loss"], found["paper_iou"], found["paper_accuracy"]) == (0.34, 0.785, 86.7)


def test_the_papers_iou_stands_beside_the_mean_over_images(finished, two_seeds):
    study, text = finished
    found = arm(table(study, "table2"), "Finetuned-Animals")
    counts = [np.load(study / f"seed{seed}/finetune_animal/test.npz")["counts"] for seed in (0, 1)]
    limits = [found["image_iou"], found["image_iou_low"], found["image_iou_high"]]
    assert limits == pytest.approx(list(t_interval([image_iou(c) for c in counts])))
    assert "| IoU, mean over images | paper | IoU of summed counts |" in text
    assert "Tested: weights of the best validation IoU." in text
    shutil.rmtree(two_seeds / "seed1")
    report(two_seeds)
    found = arm(table(two_seeds, "table2"), "Finetuned-Animals")
    each = image_iou_each(np.load(two_seeds / "seed0/finetune_animal/test.npz")["counts"])
    records = np.stack([each, np.ones_like(each)], axis=1)
    limits = [found["image_iou"], found["image_iou_low"], found["image_iou_high"]]
    assert limits == pytest.approx(list(map(float, bootstrap(records, lambda s: s[..., 0] / s[..., 1]))))


def test_trivial_predictors_stand_in_the_table(finished):
    study, _ = finished
    counts = np.load(study / "reference.npz")["counts_mean_mask"]
    row = arm(table(study, "table2"), "trivial: mean training mask")
    assert row["iou"] == pytest.approx(float(scores(counts.sum(0))["iou"]))
    assert row["image_iou"] == pytest.approx(float(image_iou(counts)))


def test_every_figure_and_table_is_written_and_every_picture_has_a_caption(finished):
    study, text = finished
    pictures = re.findall(r"!\[Figure (\d+)\]\((\w+)\.png\)", text)
    assert {name for _, name in pictures} == {
        "forest", "audit", "curves", "distribution", "pretraining", "reconstruction", "masks", "dose", "labels", "scatter"
    }  # fmt: skip
    for number, name in pictures:
        assert (study / f"report/{name}.png").stat().st_size > 5000 and f"*Figure {number}. " in text
    for name in (
        "metrics",
        "validation",
        "arms",
        "differences",
        "image_bootstrap",
        "seeds_factors",
        "audit",
        "audit_seeds",
        "printed",
        "printed_differences",
        "dose",
        "dose_slope",
        "labels",
        "labels_slope",
        "pretraining",
        "stages",
        "settings",
    ):
        assert table(study, name)
    assert "nan" not in text and "{" not in text and "None" not in text


def test_the_title_names_the_data_and_a_demo_says_so(finished):
    _, text = finished
    title = "# Pre-training images and segmentation after fine-tuning: drawn demo photos, "
    assert text.startswith(f"{title}2,000 pre-training entries, 560 labelled pets (demo)\n")
    assert "This is a demo" in text and "epochs 10 (150)" in text and "model mae_tiny (mae_base)" in text


def test_tests_stand_only_between_equal_runs(three_seeds):
    study, _ = three_seeds
    rows = {r["label"]: r for r in table(study, "differences")}
    assert len(rows) == 6
    equal = rows["Finetuned-Animals − Finetuned-Non-Animals"]
    assert (
        equal["reason"] == ""
        and 0 <= equal["p"] <= equal["holm"] <= 1
        and 0 <= equal["tost"] <= equal["tost_holm"] <= 1
    )
    for other, reason in (("Finetuned-Half", "updates 350 / 170"), ("ResNet-50", "epochs 10 instead of 3")):
        row = rows[f"Finetuned-Animals − {other}"]
        assert row["p"] is row["holm"] is row["tost"] is row["detectable"] is None and reason in row["reason"]
        assert row["verdict"] == "not tested"


def test_a_list_that_counts_images_per_category_is_not_tested(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0, 1, 2), n=40, epochs=3, animal_images="per_category")
    report(study)
    rows = table(study, "differences")
    assert all(r["p"] is None and "per category" in r["reason"] for r in rows) and len(rows) == 6
    assert all(r["mean_low"] < r["mean"] < r["mean_high"] for r in rows)


def test_one_seed_has_no_p_value_and_says_what_it_cannot_show(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0,), n=40, epochs=3)
    text = report(study)
    assert "One seed cannot show" in text and "one seed, which cannot show" in text
    assert "p (Holm)" not in text and "equivalence" not in text and not re.search(r"p = \d", text)
    assert not any({"p", "holm", "tost"} & set(r) for r in table(study, "differences"))
    counts = np.load(study / "seed0/finetune_half/test.npz")["counts"]
    row, found = arm(table(study, "table2"), "Finetuned-Half"), bootstrap(counts, lambda c: scores(c)["iou"])
    assert [row["iou"], row["iou_low"], row["iou_high"]] == pytest.approx(list(map(float, found)))
    assert row["interval"] == "bootstrap over images"


def test_an_unfinished_run_is_named_and_left_out(two_seeds):
    (two_seeds / "seed1/finetune_mixed/metrics.json").unlink()
    text = report(two_seeds)
    assert "`seed1/finetune_mixed` is unfinished: no metrics.json (logged up to update 105 of 105)" in text
    row = arm(table(two_seeds, "table2"), "Finetuned-Mixed")
    assert row["seeds"] == 1 and "without seed 1" in row["note"]
    assert arm(table(two_seeds, "table2"), "Finetuned-Animals")["seeds"] == 2
    (two_seeds / "seed0/finetune_mixed/metrics.json").unlink()
    assert "| Finetuned-Animals − Finetuned-Mixed | – | – | – | no seed has both runs |" in report(two_seeds)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("test.npz", None, "not tested: no test.npz"),
        ("test.npz", b"PK torn", "unreadable"),
        ("metrics.json", b"{", "unreadable"),
        ("config.json", None, "missing: not started"),
    ],
)
def test_a_missing_or_damaged_record_is_named(two_seeds, name, content, words):
    path = two_seeds / "seed0/finetune_animal" / name
    path.unlink() if content is None else path.write_bytes(content)
    text = report(two_seeds)
    assert re.search(rf"`seed0/finetune_animal` is {words}", text)
    assert arm(table(two_seeds, "table2"), "Finetuned-Animals")["seeds"] == 1


def test_a_record_without_what_the_tables_need_is_named(two_seeds):
    (two_seeds / "seed0/finetune_animal/config.json").write_text("{}")
    (two_seeds / "seed1/pretrain_mixed/metrics.json").write_text("{}")
    text = report(two_seeds)
    assert "`seed0/finetune_animal` is unreadable" in text and "`seed1/pretrain_mixed` is unreadable" in text


def test_a_study_with_nothing_finished_still_has_a_report(two_seeds):
    for path in two_seeds.glob("seed*/*/metrics.json"):
        path.unlink()
    text = report(two_seeds)
    assert "No arm has been trained and tested yet." in text and text.count("is unfinished") == 18


def test_unequal_seeds_are_named_and_not_averaged(two_seeds):
    shutil.rmtree(two_seeds / "seed1/finetune_half")
    rewrite_run(two_seeds, 1, "finetune", "half", n=40, epochs=3, changes={"blr": 0.5})
    text = report(two_seeds)
    assert (
        "`seed1/finetune_half` has other settings than `seed0/finetune_half` (blr 0.5 instead of 0.008): not averaged"
        in text
    )
    rows = table(two_seeds, "table2")
    assert arm(rows, "Finetuned-Half")["seeds"] == arm(rows, "Finetuned-Half (seed 1: other settings)")["seeds"] == 1
    single = scores(np.load(two_seeds / "seed0/finetune_half/test.npz")["counts"].sum(0))["iou"]
    assert arm(rows, "Finetuned-Half")["iou"] == pytest.approx(float(single))


def test_an_arm_after_another_pre_training_is_not_averaged(two_seeds):
    edit(two_seeds / "seed1/pretrain_mixed/config.json", lambda c: c["experiment"].update(mask_ratio=0.5))
    text = report(two_seeds)
    assert (
        "`seed1/finetune_mixed` has other settings than `seed0/finetune_mixed` (pretrain.mask_ratio 0.5 instead of 0.75)"
        in text
    )
    assert arm(table(two_seeds, "table2"), "Finetuned-Mixed")["seeds"] == 1


def test_runs_of_other_test_images_or_weights_are_left_out(two_seeds):
    path = two_seeds / "seed0/baseline_mae/test.npz"
    with np.load(path) as arrays:
        np.savez(path, **{k: v[::-1] if k == "ids" else v for k, v in dict(arrays).items()})
    edit(two_seeds / "seed0/finetune_half/config.json", lambda c: c["experiment"].update(init="other"))
    text = report(two_seeds)
    assert "`seed0/baseline_mae` is tested on other images than its siblings" in text
    assert "`seed0/finetune_half` is not comparable: it started from other weights than `seed0/finetune_animal`" in text


def test_an_arm_with_other_settings_than_the_animal_arm_is_named(two_seeds):
    for seed in (0, 1):
        edit(two_seeds / f"seed{seed}/finetune_mixed/config.json", lambda c: c["experiment"].update(epochs=7))
    text = report(two_seeds)
    assert "## Runs that are missing or differ" in text
    assert "all of `finetune_mixed` has other settings than `finetune_animal` (epochs 7 instead of 3)" in text


def test_epochs_of_the_resnet_baseline_alone_are_a_remark_and_no_alarm(finished, two_seeds):
    study, text = finished
    assert "Runs that are missing or differ" not in text and "but for the schedule of ResNet-50." in text
    section = text.split("## What each arm was trained on")[1].split("## ")[0]
    assert re.search(r"ResNet-50 was trained for [\d,]+ updates of 16 images, the MAE arms for [\d,]+ of 16", section)
    assert [arm(table(study, "arms"), k)["epochs"] for k in ("ResNet-50", "Finetuned-Animals")] == [3, 10]
    assert "ResNet-50 was trained for" not in report(two_seeds)  # as long as the others

    def longer(config):
        config["experiment"].update(epochs=5)
        config["args"].update(epochs=5)

    edit(two_seeds / "seed1/baseline_resnet50/config.json", longer)  # but its seeds must agree
    words = "`seed1/baseline_resnet50` has other settings than `seed0/baseline_resnet50` (epochs 5 instead of 3)"
    assert words in report(two_seeds)


def test_the_dose_curve_takes_the_studys_own_arms_only_where_they_are_equal(finished, tmp_path):
    study, _ = finished
    assert [r["share"] for r in table(study, "dose")] == [0, 5, 10, 25, 50, 75, 100]
    other = write_study(
        tmp_path / "study", seeds=(0,), sweeps=("animal_fraction",), n=40, epochs=3, animal_images="per_category"
    )
    report(other)
    assert [r["share"] for r in table(other, "dose")] == [5, 10, 25, 75]


def test_sections_without_runs_do_not_appear_and_old_files_go(two_seeds):
    (two_seeds / "report").mkdir()
    (two_seeds / "report/dose.png").write_bytes(b"old")
    text = report(two_seeds)
    assert "Share of animals" not in text and not (two_seeds / "report/dose.png").exists()
    assert "Finetuned-Pets" not in text


def test_title_and_output_can_be_chosen(two_seeds, tmp_path):
    done = run_report(two_seeds, "--title", "Batch 64", "--output", tmp_path / "out/here")
    assert done.returncode == 0 and (tmp_path / "out/here/report.md").read_text().startswith(
        "# Batch 64: drawn demo photos, 2,000 pre-training entries"
    )


@pytest.mark.parametrize("content", [None, "", "no tabs\n", "0\tpretrain\tanimal\tseed0/pretrain_animal\n"])
def test_a_folder_that_is_no_study_ends_with_code_2_and_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "study.tsv").write_text(content)
    done = run_report(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_the_report_never_imports_torch(two_seeds):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import report\n"
    code += "report.main(report.get_args_parser().parse_args(sys.argv[1:]))\n"
    code += "assert not {'torch', 'torchvision', 'scipy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, two_seeds], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DAMAGES = [
    ("metrics.json", "null"),
    ("metrics.json", '{"best": {"iou": 0.5, "epoch": 1}}'),
    ("metrics.json", '{"best": {"iou": 0.5, "epoch": 1}, "last": {"iou": 0.4}, "seconds": "long"}'),
    ("log.jsonl", '{"a": 1}\n'),
    ("log.jsonl", "[1, 2]\n"),
    ("log.jsonl", '{"event": "val", "epoch": 1, "iou": null}\n'),
    ("config.json", "[]"),
]
WRONG = [
    ("roles", None, "no dictionary 'roles'"),
    ("roles", {"blr": "colour"}, "role 'colour' of blr"),
    ("scores", None, "no dictionary 'scores'"),
    ("kind", 7, "no kind"),
    ("n_train", "4", "n_train is '4' instead of a whole number"),
    ("updates", None, "updates is None instead of a whole number"),
    ("hardware", "GPU", "hardware is 'GPU' instead of a dictionary"),
    ("manifest", {"train": 1}, "manifest.train is no dictionary"),
    ("data", {}, "data has no title"),
    ("remarks", "none", "remarks is 'none' instead of a list"),
]


@pytest.mark.parametrize("name, content", DAMAGES)
def test_whatever_is_wrong_with_a_record_the_run_is_named(two_seeds, name, content):
    (two_seeds / "seed1/finetune_mixed" / name).write_text(content)
    assert "`seed1/finetune_mixed` is unreadable" in report(two_seeds)


@pytest.mark.parametrize("name, value, words", WRONG)
def test_a_configuration_that_lacks_something_is_named_with_what_it_lacks(two_seeds, name, value, words):
    edit(two_seeds / "seed1/finetune_mixed/config.json", lambda config: config.update({name: value}))
    assert f"`seed1/finetune_mixed` is unreadable: config.json: {words}" in report(two_seeds)


def test_test_records_of_another_shape_are_named(two_seeds):
    path = two_seeds / "seed1/finetune_mixed/test.npz"
    with np.load(path) as arrays:
        np.savez(path, **{k: v[:5] if k == "counts" else v for k, v in dict(arrays).items()})
    words = "unreadable: test.npz: counts must have the shape [40, 3, 3], found [5, 3, 3]"
    assert f"`seed1/finetune_mixed` is {words}" in report(two_seeds)


def test_what_a_setting_means_is_read_from_its_role_and_not_from_its_name(two_seeds):
    """A flag that no file of the report has heard of: it may differ between arms, seeds or kinds of network, or not."""

    def add(folder, role, value):
        def change(config):
            config["experiment"]["new_flag"] = value
            config["roles"]["new_flag"] = role

        edit(two_seeds / folder / "config.json", change)

    def notes():
        return "\n".join(Study(two_seeds).notes)

    folders = [path.parent for path in two_seeds.glob("seed*/*/config.json") if "pretrain" not in path.parent.name]
    values = {"recipe": "one", "seed": "one", "arm": "one", "network": "one"}
    for role, usual in values.items():
        for folder in folders:
            other = folder.name == "finetune_mixed" and folder.parent.name == "seed1"
            add(folder, role, "another" if other else usual)
        text = notes()
        assert ("new_flag another instead of one" in text) == (role != "seed"), role  # seeds of an arm must agree
    for role in values:
        for folder in folders:
            add(folder, role, "another" if folder.name == "finetune_mixed" else "one")
        text = notes()
        named = "all of `finetune_mixed` has other settings than `finetune_animal` (new_flag another instead of one)"
        assert (named in text) == (role in ("recipe", "network")), role
    for role in values:
        for folder in folders:
            add(folder, role, "another" if folder.name.startswith("baseline") else "one")
        named = "all of `baseline_mae` has other settings than `finetune_animal` (new_flag another instead of one)"
        assert (named in notes()) == (role == "recipe"), role
    assert set(values) < set(ROLES)


def test_another_task_is_reported_without_segmentations_sections(tmp_path):
    seeds = (0, 1, 2)
    study = write_study(tmp_path / "study", seeds=seeds, task="breeds", n=60, epochs=3, extra=("cars",))
    text = report(study, draw=True)
    title = "# Pre-training images and breeds after fine-tuning: drawn demo photos, 2,000 pre-training entries, "
    assert text.startswith(f"{title}560 labelled images (demo)\n")
    assert "## Task: breeds" in text and "Table 2" not in text and "IoU" not in text and "None" not in text
    assert "is missing" not in text and "{" not in text
    rows = table(study, "task_breeds")
    found = arm(rows, "Finetuned-Animals")
    records = [np.load(study / f"seed{seed}/finetune_animal/test.npz") for seed in seeds]
    tops = [r["numerators"][:, 0].sum() / r["denominators"][:, 0].sum() for r in records]
    expected = np.clip(t_interval(tops), 0, 1)
    assert [found["top1"], found["top1_low"], found["top1_high"]] == pytest.approx(list(expected))
    assert arm(rows, "Finetuned-cars")["seeds"] == 3
    [row] = [r for r in table(study, "task_breeds_differences") if r["label"].endswith("− Finetuned-Non-Animals")]
    others = [np.load(study / f"seed{seed}/finetune_non_animal/test.npz")["numerators"][:, 0].mean() for seed in seeds]
    assert row["mean"] == pytest.approx(100 * np.mean(np.array(tops) - others)) and row["p"] <= row["holm"] <= 1


def test_one_seed_of_another_task_has_the_bootstrap_over_images(tmp_path):
    study = write_study(tmp_path / "study", task="breeds", n=60, epochs=3, seeds=(0,))
    report(study)
    numerators = np.load(study / "seed0/finetune_half/test.npz")["numerators"]
    records = np.stack([numerators, np.ones_like(numerators)], axis=-1)
    value, low, high = bootstrap(records, lambda sums: sums[..., 0] / sums[..., 1])
    row = arm(table(study, "task_breeds"), "Finetuned-Half")
    assert [row["top1"], row["top1_low"], row["top1_high"]] == pytest.approx([value[0], low[0], high[0]])


def test_a_new_objective_has_the_curves_of_its_own_scores(tmp_path):
    study = write_study(tmp_path / "study", objective="tokens", n=40, epochs=3)
    text = report(study)
    assert "Pre-training (tokens)" in text and "(pretraining_tokens.png)" in text
    assert "reconstruction" not in text and "predicting zero" not in text and "Table 2" in text
    assert {"accuracy_masked", "iou"} <= set(table(study, "pretraining")[0])


def test_the_curves_of_pre_training_stand_beside_predicting_zero_where_it_was_recorded(two_seeds):
    drawn = {}

    def keep(path, panels, curves):
        drawn[path.stem] = panels
        draw_nothing(path)

    def draw():
        with mock.patch.multiple(figures, **dict.fromkeys(DRAWING, draw_nothing) | {"curve_panels": keep}):
            main(get_args_parser().parse_args([str(two_seeds)]))
        return [(panel.title, panel.levels) for panel in drawn["pretraining"]]

    titles = list(SCORES["mae"].values())
    assert draw() == [(title, {"predicting zero": 1.0}) for title in titles]
    for path in two_seeds.glob("seed*/pretrain_*/metrics.json"):
        edit(path, lambda metrics: metrics.pop("predict_zero"))
    assert draw() == [(title, {}) for title in titles]


def test_the_fixture_gives_every_flag_a_role(two_seeds):
    for path in two_seeds.glob("seed*/*/config.json"):
        assert set(json.loads(path.read_text())["experiment"]) <= set(role_of())


def test_pictures_logs_and_references_that_are_lost_or_damaged_are_named(two_seeds):
    for name in ("seed0/finetune_mixed/panels.npz", "seed0/pretrain_mixed/reconstruction.npz", "reference.npz"):
        (two_seeds / name).write_bytes((two_seeds / name).read_bytes()[:100])
    (two_seeds / "seed0/finetune_half/panels.npz").unlink()
    (two_seeds / "seed1/finetune_half/log.jsonl").unlink()
    text = report(two_seeds)
    for name in ("seed0/finetune_mixed/panels.npz", "seed0/pretrain_mixed/reconstruction.npz", "reference.npz"):
        assert f"`{name}` is unreadable" in text
    assert "`seed0/finetune_half/panels.npz` is missing" in text and "`seed1/finetune_half` has no log.jsonl" in text


def test_a_reference_of_other_images_is_not_shown(two_seeds):
    arrays = dict(np.load(two_seeds / "reference.npz"))
    np.savez(two_seeds / "reference.npz", **{k: v[:3] if v.ndim else v for k, v in arrays.items()})
    text = report(two_seeds)
    assert "`reference.npz` is of other images or another size" in text and "trivial:" not in text


def test_a_run_that_is_listed_twice_is_no_second_seed(two_seeds):
    table = two_seeds / "study.tsv"
    lines = read_lines(table.read_text())
    table.write_text(write_lines([*lines, lines[0]]))
    done = run_report(two_seeds)
    assert done.returncode == 2 and "lists seed0/pretrain_animal twice" in done.stderr


def test_a_setting_that_one_seed_alone_has_is_a_difference(two_seeds):
    edit(two_seeds / "seed1/finetune_mixed/config.json", lambda c: c["experiment"].update(clip_grad=1.0))
    assert "(clip_grad 1.0 instead of None): not averaged" in report(two_seeds)
    edit(two_seeds / "seed1/finetune_half/config.json", lambda c: c.update(precision="bf16"))
    assert "(precision bf16 instead of fp32): not averaged" in report(two_seeds)


def test_a_dose_of_another_size_is_named_and_left_out(finished, tmp_path):
    study = shutil.copytree(finished[0], tmp_path / "study")
    for seed in (0, 1):
        edit(study / f"seed{seed}/pretrain_dose_0.25/config.json", lambda c: c.update(n_train=1000, updates=310))
    text = report(study)
    assert "`seed0/finetune_dose_0.25` has other settings or updates than" in text and "not in its sweep" in text
    assert 25.0 not in [row["share"] for row in table(study, "dose")]


# ----------------------------------------------------------------------------------------------------------------------
# Honesty: what was left out, what the data are, and numbers that cannot be


def test_an_image_that_was_left_out_is_named_and_not_counted(two_seeds):
    def left_out(metrics):
        metrics |= {"n_train": 559, "n_unique": 559, "unreadable": ["pets/a*b.jpg"]}

    for seed in (0, 1):
        edit(two_seeds / f"seed{seed}/finetune_animal/metrics.json", left_out)
    path = two_seeds / "seed0/finetune_half/test.npz"
    with np.load(path) as arrays:
        np.savez(path, **arrays, unreadable=np.array(["pets/tested.jpg"]))
    text = report(two_seeds)
    assert "pets/a\\*b.jpg could not be read: left out by `seed0/finetune_animal` and 1 more runs" in text
    assert "pets/tested.jpg could not be read: left out by `seed0/finetune_half`" in text
    row = arm(table(two_seeds, "arms"), "Finetuned-Animals")
    assert (row["images"], row["unique"]) == (559, 559)


def test_the_title_joins_what_the_runs_say_of_their_data(two_seeds):
    for path in two_seeds.glob("seed*/*/config.json"):
        pretraining = "pretrain" in path.parent.name
        title = "116 COCO photos of 123,287" if pretraining else "118 pets of 7,349"
        edit(path, lambda config, title=title: config.update(data={"title": title}))
    assert "116 COCO photos of 123,287 and 118 pets of 7,349" in report(two_seeds).splitlines()[0]


def test_no_interval_of_a_score_leaves_what_is_possible_and_no_zero_is_negative(two_seeds):
    for arm_name, right in (("finetune_half", 0), ("finetune_mixed", 1)):  # scores at the edges, apart by seed
        for seed in (0, 1):
            path = two_seeds / f"seed{seed}/{arm_name}/test.npz"
            with np.load(path) as arrays:
                counts = np.broadcast_to(np.eye(3, dtype=np.int64) * 100 * right, (40, 3, 3)).copy()
                counts[:seed, 0, 0] += 1
                counts[:, 0, 1] += 10 * seed + 1
                np.savez(path, **{**arrays, "counts": counts, "counts_native": counts})
    text = report(two_seeds)
    limits = []
    for name in ("table2", "metrics", "validation"):
        for row in table(two_seeds, name):
            limits += [
                row[key] for key in row if key.startswith(("iou", "miou", "image_iou", "boundary", "best", "last"))
            ]
    numbers = [value for value in limits if isinstance(value, float)]
    assert numbers and min(numbers) == 0 and max(numbers) <= 1
    assert not re.search(r"[-−]0\.0+\b", text)


def test_numbers_that_round_to_zero_have_no_minus_sign():
    assert [fixed(-0.001, 2), fixed(-0.04, 1, "+"), fixed(-0.06, 1, "+"), fixed(0.0, 3)] == [
        "0.00",
        "+0.0",
        "-0.1",
        "0.000",
    ]
    assert show(Estimate(-0.0001, -0.0002, 0.4), 2) == "0.00 [0.00, 0.40]"
