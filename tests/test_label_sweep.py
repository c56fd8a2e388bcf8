"""`run_all.sh --sweep labels`: chains of three runs in the plan, in the order of their execution, and in the report."""

import itertools
import json
import shlex
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_folder import write_study
from test_report import draw_nothing

import arms
import carry_out
import figures
import label_pretraining
import report
import status
import study as study_script
from groups import Study
from records import SEGMENT
from study import PlanError, PlanLine, generations, read_args
from tables import Page

DEMO = ["--demo", "--dry_run", "--sweep", "labels"]


def plan(*words) -> list[PlanLine]:
    args = read_args([str(word) for word in words], "run_all.sh")
    args.on_gpus = False
    return study_script.make_plan(args, paper_sizes=False)


def line(number: int, parent: int | None, seed: int = 0) -> PlanLine:
    """Write a line of a plan whose parent has a number, too."""
    before = "" if parent is None else f"run{parent}"
    return PlanLine(seed, "pretrain", f"arm{number}", f"run{number}", before, "", None, "pretrain.py")


# -- Generations --------------------------------------------------------------------------------------------------------


@st.composite
def families(draw) -> list[PlanLine]:
    """Draw a plan in which each run starts from none or from an earlier one."""
    lines = []
    for number in range(draw(st.integers(0, 20))):
        parent = draw(st.none() if number == 0 else st.none() | st.integers(0, number - 1))
        lines.append(line(number, parent))
    return lines


@settings(deadline=None, database=None)
@given(families())
def test_a_run_stands_one_generation_after_the_one_that_it_starts_from(lines):
    found = generations(lines)
    assert sorted(itertools.chain.from_iterable(found)) == sorted(lines)
    place = {run.folder: number for number, part in enumerate(found) for run in part}
    for part in found:
        assert part
        assert [run for run in lines if run in part] == part
    for run in lines:
        assert place[run.folder] == (place[run.parent] + 1 if run.parent else 0)


def test_a_run_before_the_one_that_it_starts_from_is_named():
    with pytest.raises(PlanError, match="run1 starts from run2, which the plan does not list before it"):
        generations([line(0, None), line(1, 2), line(2, None)])


def test_runs_are_started_after_what_they_start_from_in_every_order():
    lines = plan(*DEMO, "--seeds", 0, 1)
    parents = {run.folder: run.parent for run in lines}
    sequential = carry_out.list_folders(Path(), lines, "in_order")
    others = carry_out.list_folders(Path(), lines, "alone") + carry_out.list_folders(Path(), lines, "others")
    for order in (sequential, others, carry_out.list_folders(Path(), lines, "side_by_side")):
        assert sorted(order) == sorted(parents)
        begun = set()
        for folder in order:
            assert parents[folder] in {"", *begun}
            begun.add(folder)
    last = [run for run in lines if run.folder == "seed1/finetune_labels_mae_11"]
    before = [run.folder for run in carry_out.ancestors(lines, last[0])]
    assert before == ["seed1/pretrain_labels_mae_11", "seed1/pretrain_animal"]


def test_the_last_of_three_runs_waits_while_the_first_one_trains(tmp_path, monkeypatch):
    lines = [line(0, None), line(1, 0), line(2, 1)]
    first, second, _ = (carry_out.Files(tmp_path, run) for run in lines)
    clock = itertools.count(step=carry_out.START_SECONDS / 2)
    monkeypatch.setattr(carry_out.time, "monotonic", lambda: next(clock))
    naps = itertools.count()
    holding = carry_out.held(first.lock)
    holding.__enter__()

    def nap(seconds: float) -> None:
        """Let the first run end after a long time, then the second one."""
        number = next(naps)
        if number == 10:
            holding.__exit__(None, None, None)
            second.folder.mkdir(parents=True)
            second.metrics.write_text("{}")

    monkeypatch.setattr(carry_out.time, "sleep", nap)
    carry_out.wait_for([second, first])
    assert second.metrics.exists()
    assert next(naps) == 11


# -- The plan -----------------------------------------------------------------------------------------------------------


def flag(run: PlanLine, name: str) -> str:
    """Give the value of a flag that counts, the last one."""
    words = shlex.split(run.command)
    return [words[place + 1] for place, word in enumerate(words) if word == f"--{name}"][-1]


def label_runs(lines: list[PlanLine], stage: str) -> dict[str, PlanLine]:
    return {run.arm: run for run in lines if run.sweep == "labels" and run.stage == stage}


@pytest.mark.parametrize(("words", "lengths"), [(DEMO, (2, 11)), (["--dry_run", "--sweep", "labels"], (15, 50, 100))])
def test_the_grid_is_labels_from_random_weights_and_after_the_autoencoder(words, lengths):
    lines = plan(*words)
    pretrainings = label_runs(lines, "pretrain")
    tuned = label_runs(lines, "finetune")
    names = {f"labels_{before}_{epochs}" for before in ("none", "mae") for epochs in lengths}
    assert set(pretrainings) == names
    assert set(tuned) == {*names, "labels_mae_0"}
    for name, run in pretrainings.items():
        after_mae = "mae" in name
        assert run.parent == ("seed0/pretrain_animal" if after_mae else "")
        assert ("--init" in run.command) == after_mae
        assert flag(run, "objective") == "labels"
        assert flag(run, "epochs") == name.split("_")[-1] == f"{run.value:g}"
        assert flag(run, "split") == "animal"
        assert tuned[name].parent == run.folder
    for run in tuned.values():
        assert flag(run, "load") == "encoder"
    assert tuned["labels_mae_0"].parent == "seed0/pretrain_animal"


def test_the_users_flags_reach_all_pre_trainings_but_for_the_epochs_of_the_sweep():
    lines = plan(*DEMO, "--pretrain_args", "--epochs 9 --batch_size 8 --epoch_updates 3")
    runs = label_runs(lines, "pretrain")
    assert [flag(run, "epochs") for run in runs.values()] == ["2", "11", "2", "11"]
    assert {flag(run, name) for run in runs.values() for name in ("batch_size",)} == {"8"}
    assert {flag(run, "epoch_updates") for run in runs.values()} == {"3"}
    [usual] = [run for run in lines if run.folder == "seed0/pretrain_animal"]
    assert flag(usual, "epochs") == "9"


@pytest.mark.parametrize("words", [["--objective", "denoise"], ["--protocol", "original"]])
def test_what_contradicts_the_sweep_is_refused(words):
    with pytest.raises(PlanError, match="--sweep labels"):
        plan("--dry_run", "--sweep", "labels", *words)


def test_an_arm_of_the_sweep_is_found_by_its_name_and_says_what_it_does(tmp_path):
    for run in plan(*DEMO):
        arm = arms.find_arm(run.stage, run.arm, run.sweep, run.value)
        assert (arm.key, arm.sweep, arm.value) == ((run.stage, run.arm), run.sweep, run.value)
    progress = status.read_progress(tmp_path, label_runs(plan(*DEMO), "pretrain")["labels_mae_11"])
    assert progress.purpose == "learning what images show (MAE, then 11 epochs of labels)"
    assert progress.kind == ("labels", "")


# -- The report ---------------------------------------------------------------------------------------------------------


def make_section(folder: Path) -> tuple[Study, str]:
    """Write the section of a study -> (the study, its text)."""
    study = Study(folder)
    page = Page(folder)
    label_pretraining.section(study, page, label_pretraining.read_sweep(study, SEGMENT))
    page.write("report")
    return study, (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Study, str]:
    """A study of two seeds with the sweep -> (it, the text of its section)."""
    return make_section(write_study(tmp_path_factory.mktemp("labels") / "study", sweeps=("labels",), n=40, epochs=10))


def table(study: Study, name: str) -> list[dict]:
    return json.loads((study.path / f"{name}.json").read_text())


def test_the_table_has_each_chain_with_its_operations_and_marks_pairs_of_equal_cost(made):
    study, _ = made
    rows = {(row["line"], row["epochs"]): row for row in table(study, "label_pretraining")}
    assert set(rows) == {
        *itertools.product(["from random weights"], [0, 15, 50, 100]),
        *itertools.product(["after the MAE"], [0, 15, 50, 100]),
    }
    # 10 epochs of 62 updates of 32 images at 1 GFLOP; labels take 10 / 35 of that.
    mae = 10 * 62 * 32 * 1e9 / 1e12
    assert rows["after the MAE", 0]["tflop"] == pytest.approx(mae)
    assert rows["from random weights", 0]["tflop"] == 0
    assert rows["after the MAE", 15]["tflop"] == pytest.approx(mae * (1 + 15 / 35))
    assert rows["from random weights", 50]["tflop"] == pytest.approx(mae * 50 / 35)
    pair = {("after the MAE", 15), ("from random weights", 50)}
    assert {key for key, row in rows.items() if row["pair"] == "a"} == pair
    assert rows["after the MAE", 15]["before"] == 620
    assert rows["after the MAE", 15]["updates"] == 15 * 62
    assert rows["after the MAE", 100]["prior"] == 3.2
    assert rows["after the MAE", 100]["lowest"] == pytest.approx(0.6)
    assert rows["after the MAE", 100]["loss"] == pytest.approx(2.5)


def test_the_report_says_who_reaches_a_cross_entropy_first_and_what_the_autoencoder_changes(made):
    study, text = made
    for seed in (0, 1):
        assert (
            f"Seed {seed}: from random weights, the lowest cross-entropy 2.500 is reached after 6,200 updates" in text
        )
    assert "after the MAE the same is reached after" in text
    found = {row["epochs"]: row for row in table(study, "label_differences")}
    assert set(found) == {0, 15, 50, 100}
    assert found[50]["mean"] > 0
    assert (study.path / "label_pretraining.png").stat().st_size > 10_000
    assert study.notes == []


def test_a_run_of_the_sweep_with_another_fine_tuning_is_named_and_left_out(tmp_path):
    folder = write_study(tmp_path / "study", seeds=(0,), sweeps=("labels",), n=40, epochs=3)
    path = folder / "seed0/finetune_labels_mae_50/config.json"
    config = json.loads(path.read_text())
    config["experiment"]["crop_scale"] = 0.9
    path.write_text(json.dumps(config))
    study = Study(folder)
    assert len(label_pretraining.read_sweep(study, SEGMENT)) == 7
    assert any("`seed0/finetune_labels_mae_50` has other settings than" in note for note in study.notes)


def test_a_chain_without_its_pre_training_is_no_point(tmp_path):
    folder = write_study(tmp_path / "study", seeds=(0,), sweeps=("labels",), n=40, epochs=3)
    (folder / "seed0/pretrain_labels_none_15/metrics.json").unlink()
    points = label_pretraining.read_sweep(Study(folder), SEGMENT)
    assert [(point.line.name, point.epochs) for point in points if point.epochs == 15] == [("mae", 15)]


def test_the_report_of_another_task_has_the_sweep_too(tmp_path):
    folder = write_study(tmp_path / "study", seeds=(0,), sweeps=("labels",), n=40, epochs=3, task="breeds")
    with mock.patch.multiple(figures, curve_panels=draw_nothing, image_grid=draw_nothing):
        report.main(report.get_args_parser().parse_args([str(folder)]))
    text = (folder / "report/report.md").read_text()
    assert "| accuracy [95 %] |" in text
    assert "label_pretraining.png" in text
    assert len(json.loads((folder / "report/label_pretraining.json").read_text())) == 8
