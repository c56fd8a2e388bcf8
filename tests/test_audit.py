"""The original protocol and the audit: what a plan changes, how the original scripts score, what the report says of it."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from study_folder import LEAK, counts, write_study

import baseline
import figures
import finetune
import pretrain
from arms import ANIMAL, AUDIT, CHOICES, RESNET, SUPERVISED
from metrics import scores, t_interval, unpaired_bootstrap
from protocols import PROTOCOLS, SCHEDULE
from quirks import (
    MAE_SCRIPT,
    RESNET_SCRIPT,
    SEED,
    SETS,
    ImageScores,
    last_batch,
    printed,
    range_on_other_images,
    range_on_same_images,
    spread,
)
from report import get_args_parser, main
from study import PlanLine, read_lines, write_lines

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"pretrain.py": pretrain, "finetune.py": finetune, "baseline.py": baseline}
PLACES = {"output_dir", "init", "data_root", "cache_dir"}  # flags that name folders
MAE_ARMS = ["finetune_animal", "finetune_half", "finetune_non_animal", "finetune_mixed", "baseline_mae"]


def run_study(*words):
    return subprocess.run([sys.executable, ROOT / "study.py", *words], capture_output=True, text=True)


def plan(*words) -> list[PlanLine]:
    done = run_study("plan", "--dry_run", *words)
    assert done.returncode == 0, done.stderr
    return read_lines(done.stdout)


def parsed(line: PlanLine) -> dict:
    """The values that a line's script takes from its command."""
    script, *words = shlex.split(line.command)
    values = vars(SCRIPTS[script].get_args_parser().parse_args(words))
    return {name: value for name, value in values.items() if name not in ("roles", "script")}


def changes(line: PlanLine, other: PlanLine) -> dict:
    """The flags that differ between two lines, with the values of the first."""
    mine = parsed(line)
    theirs = parsed(other)
    assert set(mine) == set(theirs)
    return {name: value for name, value in mine.items() if value != theirs[name] and name not in PLACES}


# -- plans --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("demo", [[], ["--demo"]])
def test_each_arm_of_an_audit_makes_one_choice_of_the_original(demo):
    lines = {line.folder: line for line in plan("--audit", "--seeds", "0", "3", *demo)}
    assert len(lines) == 2 * (9 + 1 + 9)
    assert sum(line.sweep == AUDIT and line.value is None for line in lines.values()) == 20
    for seed in (0, 3):
        for choice in CHOICES:
            own = lines[f"seed{seed}/{choice.key.stage}_{choice.key.name}"]
            partner = lines[f"seed{seed}/{choice.partner.stage}_{choice.partner.name}"]
            if choice.in_pretraining:
                assert changes(own, partner) == {}
                assert own.parent == f"seed{seed}/pretrain_{choice.key.name}"
                assert changes(lines[own.parent], lines[partner.parent]) == choice.flags
            else:
                assert changes(own, partner) == choice.flags
                assert own.parent == partner.parent


def test_the_choices_of_an_audit_are_those_of_the_original_protocol():
    original = PROTOCOLS["original"]
    for choice in CHOICES:
        kind = {ANIMAL: "finetune", SUPERVISED: "supervised"}[choice.partner]
        flags = original["pretrain" if choice.in_pretraining else kind]
        for name, value in choice.flags.items():
            assert flags[name] == value
    assert len({choice.key for choice in CHOICES}) == len(CHOICES) == 9


def test_the_original_protocol_sets_its_recipe():
    lines = {f"{line.stage}_{line.arm}": parsed(line) for line in plan("--protocol", "original", "--gpus", "1")}
    before = lines["pretrain_animal"]
    assert (before["batch_size"], before["blr"], before["warmup_epochs"], before["epochs"]) == (32, 1e-3, 40, 150)
    assert (before["norm_pix_loss"], before["weight_decay"], before["precision"]) == (False, 0.05, "fp16")
    for name in MAE_ARMS:
        args = lines[name]
        assert (args["batch_size"], args["blr"], args["layer_decay"], args["min_lr"]) == (64, 1e-3, 0.75, 1e-6)
        assert (args["drop_path"], args["crop_scale"], args["elastic"], args["flips"]) == (0, 0.08, 50, True)
        assert (args["inputs"], args["output"], args["train_positions"]) == ("unit", "reshape", False)
        assert (args["pets_listing"], args["pets_division"]) == ("every_jpg", "leaking")
        assert (args["trimap_resize"], args["keep"]) == ("bilinear", "last")
    args = lines["baseline_resnet50"]
    assert args["blr"] * args["batch_size"] / 256 == pytest.approx(1e-3)
    assert (args["optimizer"], args["lr_schedule"], args["warmup_epochs"]) == ("adam", "constant", 0)
    assert (args["crop_scale"], args["flips"], args["elastic"], args["weight_decay"]) == (1, False, 0, 0)
    assert (args["pets_division"], args["pets_listing"], args["keep"]) == ("disjoint", "every_jpg", "last")
    on_cpu = plan("--protocol", "original", "--gpus", "0")
    assert not any("--precision" in line.command for line in on_cpu)


def test_a_demo_of_the_original_keeps_the_demos_schedule_and_takes_the_originals_choices():
    ours = {line.folder: parsed(line) for line in plan("--demo")}
    kinds = {"pretrain_animal": "pretrain", "finetune_animal": "finetune", "baseline_mae": "supervised"}
    kinds["baseline_resnet50"] = "resnet50"
    for line in plan("--gpus", "0", "--demo", "--protocol", "original"):
        kind = kinds.get(f"{line.stage}_{line.arm}")
        if kind is None:
            continue
        args = parsed(line)
        for name, value in PROTOCOLS["original"][kind].items():
            if name in SCHEDULE:
                assert args[name] == ours[line.folder][name], name
            else:
                assert args[name] == value, name
        for name in ("model", "img_size", "cache_size", "epoch_updates"):
            assert args[name] == ours[line.folder][name]


def test_flags_of_the_user_win_over_a_protocol():
    lines = plan(
        "--gpus", "0", "--protocol", "original", "--finetune_args", "--batch_size 512 --pets_division disjoint"
    )
    for line in lines:
        if line.stage != "pretrain":
            assert (parsed(line)["batch_size"], parsed(line)["pets_division"]) == (512, "disjoint")


def test_our_protocol_is_that_of_the_scripts():
    assert not any(PROTOCOLS["ours"].values())
    assert plan("--protocol", "ours") == plan()


def test_a_plan_that_leaks_says_so_and_no_other_does():
    done = run_study("plan", "--dry_run", "--gpus", "0", "--protocol", "original")
    assert done.stderr.startswith("# 5 of 9 runs are trained on test images too (--pets_division leaking): seed0/")
    assert done.stderr.count("\n") == 1 and "resnet50" not in done.stderr
    done = run_study("plan", "--dry_run", "--audit")
    assert "# 1 of 19 runs" in done.stderr and "seed0/finetune_audit_leak" in done.stderr
    done = run_study("plan", "--dry_run", "--finetune_args", "--pets_division leaking")
    assert "# 6 of 9 runs" in done.stderr
    assert run_study("plan", "--dry_run").stderr == ""


def test_trivial_predictors_see_the_images_and_trimaps_of_the_protocol():
    settings = run_study("settings", "--dry_run", "--protocol", "original").stdout
    flags = "--img_size 224 --pets_listing every_jpg --pets_division leaking --trimap_resize bilinear"
    assert f"REFERENCE='{flags}'\n" in settings
    settings = run_study("settings", "--dry_run", "--finetune_args", "--trimap_resize=bilinear --img_size 96").stdout
    assert "REFERENCE='--img_size 96 --trimap_resize bilinear'\n" in settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--audit", "--protocol", "original"], "leave --protocol original out"),
        (["--audit", "--task", "breeds"], "leave --task breeds out"),
        (["--audit", "--objective", "dino"], "leave --objective dino out"),
        (["--protocol", "original", "--task", "breeds"], "leave --task breeds out"),
        (["--protocol", "original", "--objective", "dino"], "leave --objective dino out"),
        (["--audit", "--finetune_args", "--elastic 3"], "--finetune_args sets --elastic"),
        (["--audit", "--finetune_args", "--no-train_positions"], "--finetune_args sets --train_positions"),
        (["--audit", "--pretrain_args", "--norm_pix_loss"], "--pretrain_args sets --norm_pix_loss"),
        (["--protocol", "theirs"], "invalid choice: 'theirs'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_in_one_line(words, message):
    for what in ("plan", "settings"):
        done = run_study(what, "--dry_run", *words)
        assert done.returncode == 2 and done.stdout == ""
        assert message in done.stderr and done.stderr.count("\n") == 1


# -- what the original scripts print ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    """Test records of 1,109 images."""
    rng = np.random.default_rng(1)
    both = counts(rng, 1109, 0.8, size=32)
    both[-3] = 0
    both[-3, 1, 1] = 32**2  # an image without pet, which the original scores 1
    return {"counts": both, "loss_sum": rng.uniform(100, 900, 1109), "pixels": both.sum((1, 2))}


def slow_scores(records, chosen) -> tuple[float, float, float]:
    """IoU, accuracy and loss of some images, pixel count by pixel count."""
    ious = []
    right = pixels = loss = 0.0
    for image in chosen:
        c = records["counts"][image]
        intersection = c[0, 0]
        union = c[0].sum() + c[:, 0].sum() - intersection
        ious.append((intersection + 0.001) / (union + 0.001))
        right += c[0, 0] + c[1, 1] + c[2, 2]
        pixels += c.sum()
        loss += records["loss_sum"][image]
    return sum(ious) / len(ious), right / pixels, loss / pixels


def test_the_scripts_print_the_last_batch(records):
    images = ImageScores.from_records(records)
    found = printed(images, MAE_SCRIPT)
    assert found.images == 85
    expected = slow_scores(records, range(1109 - 85, 1109))
    assert (found.iou, found.accuracy, found.loss) == pytest.approx(
        expected, rel=1e-4
    )  # drawn images differ by a pixel
    found = printed(images, RESNET_SCRIPT)
    assert found.images == 21
    assert found.iou == pytest.approx(slow_scores(records, range(1109 - 21, 1109))[0])
    assert (found.accuracy, found.loss) == pytest.approx(slow_scores(records, range(1109))[1:], rel=1e-4)


@pytest.mark.parametrize(("images", "batch", "left"), [(1109, 128, 85), (1109, 32, 21), (90, 128, 90), (256, 128, 128)])
def test_the_last_batch_holds_what_full_ones_leave_over(images, batch, left):
    loader = [range(start, min(start + batch, images)) for start in range(0, images, batch)]
    assert last_batch(images, batch) == left == len(loader[-1])


def slow_quantiles(values) -> list[float]:
    """The limits of the middle 95 %, interpolated between sorted values."""
    ordered = sorted(values)
    limits = []
    for share in (0.025, 0.975):
        place = share * (len(ordered) - 1)
        below = int(place)
        limits.append(ordered[below] + (place - below) * (ordered[below + 1] - ordered[below]))
    return limits


def test_ranges_over_random_sets_are_those_of_slow_loops():
    rng = np.random.default_rng(2)
    a = rng.random(50)
    b = a + rng.normal(0.1, 0.05, 50)
    sets = np.random.default_rng(SEED).integers(0, 50, (SETS, 7))
    others = np.random.default_rng(SEED + 1).integers(0, 50, (SETS, 3))
    expected = slow_quantiles([sum(a[i] for i in chosen) / 7 for chosen in sets])
    assert list(spread(a, 7)) == pytest.approx(expected)
    shift = (a - b).mean()
    expected = slow_quantiles([sum(a[i] - b[i] - shift for i in chosen) / 7 for chosen in sets])
    assert list(range_on_same_images(a, b, 7)) == pytest.approx(expected)
    apart = []
    for mine, theirs in zip(sets, others, strict=True):
        apart.append(sum(a[i] for i in mine) / 7 - sum(b[i] for i in theirs) / 3 - shift)
    assert list(range_on_other_images(a, b, 7, 3)) == pytest.approx(slow_quantiles(apart))


def test_ranges_shrink_with_the_images_and_vanish_between_equal_runs():
    values = np.random.default_rng(3).random(1000)
    narrow = range_on_other_images(values, values, 400, 400)
    wide = range_on_other_images(values, values, 25, 25)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.15)
    deviation = values.std() * (2 / 25) ** 0.5
    assert wide.high == pytest.approx(1.96 * deviation, rel=0.15)
    assert range_on_same_images(values, values + 0.3, 25) == pytest.approx((0, 0))


def test_unpaired_intervals_are_those_of_independent_samples():
    rng = np.random.default_rng(4)
    a = np.stack([rng.normal(1, 0.5, 300), np.ones(300)], axis=1)
    b = np.stack([rng.normal(3, 0.2, 200), np.ones(200)], axis=1)
    found = unpaired_bootstrap(a, b, lambda s: s[..., 0] / s[..., 1])
    error = (a[:, 0].var(ddof=1) / 300 + b[:, 0].var(ddof=1) / 200) ** 0.5
    assert found.value == pytest.approx(a[:, 0].mean() - b[:, 0].mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.03)


# -- the report ---------------------------------------------------------------------------------------------------------


DRAWING = ("forest", "curve_panels", "image_grid", "bands", "scatter")


def draw_nothing(path, *_, **__):
    """Write the smallest picture in place of a figure."""
    Image.new("RGB", (1, 1)).save(path)


def report(study: Path) -> str:
    """Make the report without drawing."""
    with mock.patch.multiple(figures, **dict.fromkeys(DRAWING, draw_nothing)):
        main(get_args_parser().parse_args([str(study)]))
    return (study / "report/report.md").read_text()


def table(study: Path, name: str) -> list[dict]:
    return json.loads((study / f"report/{name}.json").read_text())


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A study of two seeds with an audit, and its report."""
    study = write_study(tmp_path_factory.mktemp("audit") / "study", n=150, epochs=2, audit=True)
    return study, report(study)


def load(study: Path, folder: str) -> np.ndarray:
    return np.load(study / folder / "test.npz")["counts"]


def test_each_choice_is_compared_with_its_partner_by_seed(audited):
    study, text = audited
    assert "## What each choice of the original code changes" in text and "Student's t over seeds" in text
    rows = {row["choice"]: row for row in table(study, "audit")}
    assert list(rows) == [choice.label for choice in CHOICES]
    for choice in CHOICES:
        differences = []
        for seed in (0, 1):
            own = load(study, f"seed{seed}/{choice.key.stage}_{choice.key.name}")
            partner = load(study, f"seed{seed}/{choice.partner.stage}_{choice.partner.name}")
            differences.append(100 * float(scores(own.sum(0))["iou"] - scores(partner.sum(0))["iou"]))
        row = rows[choice.label]
        assert [row["iou"], row["iou_low"], row["iou_high"]] == pytest.approx(list(t_interval(differences)))
        assert row["seeds"] == 2
    assert rows["layer decay from scratch"]["partner"] == "Supervised MAE"
    assert "other settings" not in text and "tested on other images" not in text


def test_only_different_test_lists_make_unpaired_intervals(audited):
    study, _ = audited
    for row in table(study, "audit"):
        assert ("the test lists differ" in row["note"]) == (row["choice"] == "leaking split")
    rows = {(row["choice"], row["seed"]): row for row in table(study, "audit_seeds")}
    own = load(study, "seed1/finetune_audit_leak")
    partner = load(study, "seed1/finetune_animal")
    found = unpaired_bootstrap(own, partner, lambda c: 100 * scores(c)["iou"])
    row = rows["leaking split", 1]
    assert [row["iou"], row["iou_low"], row["iou_high"]] == pytest.approx(list(map(float, found)))


def test_the_figure_shows_each_choice(audited):
    study, _ = audited
    drawn = {}

    def forest(path, rows, margin):
        drawn[path.stem] = rows
        draw_nothing(path)

    with mock.patch.multiple(figures, **dict.fromkeys(DRAWING, draw_nothing) | {"forest": forest}):
        main(get_args_parser().parse_args([str(study)]))
    assert [row.label for row in drawn["audit"]] == [choice.label for choice in CHOICES]
    assert all(len(row.seeds) == 2 and row.mean for row in drawn["audit"])


def test_a_leaking_run_is_named_under_the_headline(audited):
    _, text = audited
    top = text.split("## ")[0]
    assert f"- **{LEAK}**: `seed0/finetune_audit_leak`, `seed1/finetune_audit_leak`\n" in top
    assert text.count(LEAK) == 1


def test_arms_of_an_audit_stay_out_of_the_other_sections(audited):
    study, _ = audited
    assert not any("audit" in row["arm"] for row in table(study, "pretraining"))
    labels = {choice.label for choice in CHOICES}
    assert not labels & {row["arm"] for row in table(study, "table2")}


def test_a_missing_run_and_another_setting_are_noted(audited, tmp_path):
    study = shutil.copytree(audited[0], tmp_path / "study")
    shutil.rmtree(study / "seed0/finetune_audit_elastic")
    shutil.rmtree(study / "seed0/finetune_audit_last")
    shutil.rmtree(study / "seed1/finetune_audit_last")
    for seed in (0, 1):
        path = study / f"seed{seed}/finetune_audit_reshape/config.json"
        config = json.loads(path.read_text())
        config["experiment"]["weight_decay"] = 0.3
        path.write_text(json.dumps(config))
    report(study)
    rows = {row["choice"]: row for row in table(study, "audit")}
    assert rows["elastic deformation"]["seeds"] == 1 and "without seed 0" in rows["elastic deformation"]["note"]
    assert rows["last epoch's weights"]["iou"] is None
    assert "no seed has both runs" in rows["last epoch's weights"]["note"]
    assert rows["reshaped output"]["note"] == "weight_decay 0.3 instead of 0.05"


def test_one_seed_has_intervals_over_images(audited, tmp_path):
    study = shutil.copytree(audited[0], tmp_path / "study")
    lines = read_lines((study / "study.tsv").read_text())
    (study / "study.tsv").write_text(write_lines(lines[: len(lines) // 2]))
    text = report(study)
    assert "One seed: 95 % bootstrap intervals over test images" in text
    assert all(row["iou_low"] < row["iou"] < row["iou_high"] for row in table(study, "audit"))


def test_the_printed_scores_are_those_of_the_records(audited):
    study, text = audited
    assert "Our list has 150 images" in text
    rows = {(row["arm"], row["seed"]): row for row in table(study, "printed")}
    assert len(rows) == 12
    row = rows["Finetuned-Animals", 1]
    records = np.load(study / "seed1/finetune_animal/test.npz")
    assert row["last"] == 150 - 128
    expected = slow_scores(records, range(128, 150))
    assert (row["printed_iou"], row["printed_accuracy"] / 100, row["printed_loss"]) == pytest.approx(expected, rel=1e-4)
    assert row["iou"] == pytest.approx(float(scores(records["counts"].sum(0))["iou"]))
    assert row["image_iou"] == pytest.approx(slow_scores(records, range(150))[0])
    assert rows["ResNet-50", 0]["last"] == 150 - 4 * 32 and rows["ResNet-50", 0].get("accuracy_spread") is None
    assert "Two scores of one and the same network" in text
    pairs = {row["label"]: row for row in table(study, "printed_differences") if row["seed"] == 0}
    assert pairs["Finetuned-Animals − ResNet-50"].get("same") is None
    assert "same" in pairs["Finetuned-Animals − Finetuned-Mixed"]


def test_the_original_protocol_has_two_test_lists_and_says_whose_settings_it_has(tmp_path):
    choices = {name: value for name, value in PROTOCOLS["original"]["finetune"].items() if name not in SCHEDULE}
    study = write_study(tmp_path / "study", n=60, epochs=2, changes=choices)
    for seed in (0, 1):  # the ResNet's list does not leak
        folder = study / f"seed{seed}/{RESNET.stage}_{RESNET.name}"
        config = json.loads((folder / "config.json").read_text())
        for flags in (config["args"], config["experiment"]):
            flags["pets_division"] = "disjoint"
        config["remarks"] = []
        (folder / "config.json").write_text(json.dumps(config))
        for name in ("test.npz", "panels.npz"):
            with np.load(folder / name) as arrays:
                changed = dict(arrays)
            changed["ids"] = np.array([str(name).replace("dog", "cat") for name in changed["ids"]])
            np.savez(folder / name, **changed)
    text = report(study)
    assert "tested on other images than its siblings" not in text
    rows = {row["arm"]: row for row in table(study, "table2")}
    assert rows["ResNet-50"]["seeds"] == rows["Finetuned-Animals"]["seeds"] == 2
    assert "Tested: the last epoch's weights." in text
    assert "The settings are those of the original code as committed (aa2fea5" in text
    assert (
        f"- **{LEAK}**: `seed0/finetune_animal`, `seed0/finetune_half`, `seed0/finetune_non_animal` and 7 more" in text
    )
    rows = {row["label"]: row for row in table(study, "differences")}
    assert "tested on other images" in rows["Finetuned-Animals − ResNet-50"]["reason"]
