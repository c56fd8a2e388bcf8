"""`run_all.sh --sweep objective` and `--sweep num_images`: their runs in the plan, and what the report says of them."""

import itertools
import json
import shlex
from pathlib import Path

import pytest
from small_runs import SMALL, drawn_root, metrics, refusal, run
from study_folder import write_study

import arms
import objective_sweep
import pretrain
import results
import study as study_script
from groups import Study
from pretraining import images_of_an_epoch, pretraining_lists
from records import SEGMENT
from study import PlanError, PlanLine, read_args
from tables import Page

OBJECTIVES = ["mae", "tokens", "splitmask", "ijepa", "dino", "labels"]
SPLITS = ["animal", "non_animal"]


def plan(*words) -> list[PlanLine]:
    args = read_args(["--dry_run", *map(str, words)], "run_all.sh")
    args.on_gpus = False
    return study_script.make_plan(args, paper_sizes=False)


def flags_of(line: PlanLine) -> dict[str, str]:
    """Read the flags of a command: the last value of each counts."""
    found = {}
    for word, value in itertools.pairwise(shlex.split(line.command)):
        if word.startswith("--"):
            found[word[2:]] = value
    return found


def by_arm(lines: list[PlanLine], stage: str, sweep: str) -> dict[str, PlanLine]:
    return {line.arm: line for line in lines if (line.stage, line.sweep) == (stage, sweep)}


# -- The plan -----------------------------------------------------------------------------------------------------------


def test_each_objective_is_trained_on_both_kinds_of_images_for_equally_many_updates():
    lines = plan("--sweep", "objective")
    pretrainings = by_arm(lines, "pretrain", "objective")
    names = {f"objective_{name}_{split}" for name, split in itertools.product(OBJECTIVES[1:], SPLITS)}
    assert set(pretrainings) == names
    for line in pretrainings.values():
        flags = flags_of(line)
        assert line.arm == f"objective_{flags['objective']}_{flags['split']}"
        assert not line.parent
        # Their own default is that of the autoencoder, but for labels.
        assert flags.get("epochs", "150") == "150"
    usual = pretrain.get_args_parser().parse_args([])
    assert (usual.epochs, usual.warmup_epochs) == (arms.PRETRAIN_EPOCHS, arms.PRETRAIN_WARMUP_EPOCHS)


def test_all_are_fine_tuned_from_the_encoder_alone_the_studys_autoencoders_too():
    lines = plan("--sweep", "objective")
    tuned = by_arm(lines, "finetune", "objective")
    assert set(tuned) == {f"objective_{name}_{split}" for name, split in itertools.product(OBJECTIVES, SPLITS)}
    for line in tuned.values():
        assert flags_of(line)["load"] == "encoder"
        assert f"{line.parent}/model.pt" in line.command
    for split in SPLITS:
        assert tuned[f"objective_mae_{split}"].parent == f"seed0/pretrain_{split}"


def test_the_demo_trains_autoencoders_of_the_sweeps_length_and_keeps_a_decoder_in_a_line_of_its_own():
    lines = plan("--demo", "--sweep", "objective")
    pretrainings = by_arm(lines, "pretrain", "objective")
    assert set(pretrainings) == {f"objective_{name}_{split}" for name, split in itertools.product(OBJECTIVES, SPLITS)}
    schedules = {tuple(flags_of(line)[name] for name in arms.SCHEDULE) for line in pretrainings.values()}
    assert len(schedules) == 1
    tuned = by_arm(lines, "finetune", "objective")
    for split in SPLITS:
        line = tuned[f"objective_mae_decoder_{split}"]
        assert "load" not in flags_of(line)
        assert line.parent == f"seed0/pretrain_objective_mae_{split}"
    assert len({flags_of(line)["epochs"] for line in tuned.values()}) == 1


def test_every_command_of_the_sweeps_is_one_that_its_script_understands():
    for words in ([], ["--demo"]):
        for line in plan(*words, "--sweep", "objective", "--sweep", "num_images"):
            if line.stage == "pretrain" and flags_of(line).get("objective", "mae") in pretrain.OBJECTIVES:
                parser = pretrain.get_args_parser(flags_of(line).get("objective", "mae"))
                parser.parse_args(shlex.split(line.command)[1:])


@pytest.mark.parametrize("words", [["--objective", "labels"], ["--protocol", "original"]])
def test_what_contradicts_the_sweep_over_objectives_is_refused(words):
    with pytest.raises(PlanError, match="--sweep objective"):
        plan("--sweep", "objective", *words)


@pytest.mark.parametrize(
    "sweep, option, flags, message",
    [
        (
            "objective",
            "--pretrain_args",
            "--objective=dino",
            "--pretrain_args sets --objective, which --sweep objective",
        ),
        ("labels", "--pretrain_args", "--objective dino", "--pretrain_args sets --objective, which --sweep labels"),
        ("objective", "--finetune_args", "--load=all", "--finetune_args sets --load, which --sweep objective changes"),
        ("objective", "--pretrain_args", "--micro_batch_size 2", "leave --micro_batch_size out of --pretrain_args"),
        ("num_images", "--pretrain_args", "--image_fraction 0.5", "--pretrain_args sets --image_fraction"),
        ("num_images", "--pretrain_args", "--num_images 64", "--pretrain_args sets --num_images"),
        ("animal_fraction", "--pretrain_args", "--animal_fraction 1", "--pretrain_args sets --animal_fraction"),
        ("label_fraction", "--finetune_args", "--label_fraction 1", "--finetune_args sets --label_fraction"),
    ],
)
def test_a_flag_that_would_make_the_lines_of_a_sweep_something_else_is_refused(sweep, option, flags, message):
    with pytest.raises(PlanError, match=message):
        plan("--sweep", sweep, option, flags)


@pytest.mark.parametrize("words", [[], ["--demo"]])
def test_an_arm_of_either_sweep_is_found_by_its_name(words):
    for line in plan(*words, "--sweep", "objective", "--sweep", "num_images"):
        arm = arms.find_arm(line.stage, line.arm, line.sweep, line.value)
        assert (arm.key, arm.sweep, arm.value) == ((line.stage, line.arm), line.sweep, line.value)


def test_shares_of_the_images_are_trained_for_any_objective():
    lines = plan("--sweep", "num_images", "--objective", "labels")
    pretrainings = by_arm(lines, "pretrain", "num_images")
    shares = [0.01, 0.05, 0.1, 0.5]
    assert set(pretrainings) == {f"{split}_images_{share:g}" for split, share in itertools.product(SPLITS, shares)}
    for line in pretrainings.values():
        flags = flags_of(line)
        assert flags["objective"] == "labels"
        assert float(flags["image_fraction"]) == line.value
        assert line.arm.startswith(f"{flags['split']}_images")


# -- Parts of a split ---------------------------------------------------------------------------------------------------


def lists_of(root: Path, *words):
    args = pretrain.get_args_parser().parse_args(["--data_root", str(root), "--cache_dir", str(root / "cache"), *words])
    lists = pretraining_lists(args)
    return list(lists.train.images), images_of_an_epoch(args, lists)


@pytest.mark.parametrize("split", ["animal", "mixed", "pets"])
def test_parts_are_nested_and_an_epoch_stays_that_of_the_whole(split, tmp_path_factory):
    root = drawn_root(tmp_path_factory)
    whole, epoch = lists_of(root, "--split", split)
    smaller = set(whole)
    for share in (0.5, 0.25, 0.001):
        part, same = lists_of(root, "--split", split, "--image_fraction", str(share))
        assert len(part) == max(1, round(share * len(whole)))
        assert same == epoch
        assert set(part) <= smaller
        smaller = set(part)


def test_a_part_of_ones_own_images_is_trained_for_as_many_updates(tmp_path_factory):
    root = drawn_root(tmp_path_factory)
    folder = root / "oxford-iiit-pet" / "images"
    whole, epoch = lists_of(root, "--images", str(folder))
    part, same = lists_of(root, "--images", str(folder), "--image_fraction", "0.5")
    assert set(part) < set(whole)
    assert (len(part), same) == (round(len(whole) / 2), epoch)


def test_a_run_on_a_part_makes_the_updates_of_the_whole(tmp_path_factory, tmp_path):
    flags = [*SMALL, "--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path / "cache"]
    flags += ["--model", "mae_tiny", "--epochs", 1, "--batch_size", 4]
    for share in (1, 0.25):
        run("pretrain", *flags, "--image_fraction", share, "--output_dir", tmp_path / f"part{share}")
    whole = metrics(tmp_path / "part1")
    part = metrics(tmp_path / "part0.25")
    assert part["updates"] == whole["updates"]
    assert part["n_train"] == round(whole["n_train"] / 4)


def test_two_numbers_of_images_are_refused(tmp_path_factory, tmp_path):
    words = ["--data_root", drawn_root(tmp_path_factory), "--num_images", 8, "--image_fraction", 0.5]
    message = refusal("pretrain", *SMALL, *words, "--output_dir", tmp_path / "no")
    assert message == "--image_fraction and --num_images both say how many images; leave one of them out"
    assert not (tmp_path / "no").exists()


# -- The report ---------------------------------------------------------------------------------------------------------


def make_section(folder: Path) -> tuple[Study, str]:
    """Write both sections of a study -> (the study, their text)."""
    study = Study(folder)
    page = Page(folder)
    objective_sweep.section(study, page, objective_sweep.read_sweep(study, SEGMENT))
    results.shares(page, results.read_sweep(study, arms.NUM_IMAGES), results.IMAGE_SHARES)
    page.write("report")
    return study, (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Study, str]:
    folder = tmp_path_factory.mktemp("sweeps") / "study"
    return make_section(write_study(folder, seeds=(0, 1, 2), sweeps=("objective", "num_images"), n=40, epochs=10))


def table(study: Study, name: str) -> list[dict]:
    return json.loads((study.path / f"{name}.json").read_text())


def test_the_table_has_each_objective_on_each_kind_of_images_with_what_it_costs(made):
    study, _ = made
    rows = table(study, "objectives")
    names = ["MAE with its decoder", "MAE", "tokens (BEiT)", "SplitMask", "I-JEPA", "DINO", "labels"]
    assert [(row["line"], row["images"]) for row in rows] == list(itertools.product(names, ["animals", "non-animals"]))
    assert {row["updates"] for row in rows} == {620}
    cost = {row["line"]: row["times_mae"] for row in rows}
    assert cost["DINO"] == pytest.approx(4.8)
    assert cost["labels"] == pytest.approx(10 / 35)
    assert cost["I-JEPA"] == 1
    [dino, _] = [row for row in rows if row["line"] == "DINO"]
    assert dino["knn"] == pytest.approx(0.3, abs=0.03)
    assert all(row["seeds"] == 3 for row in rows)
    assert study.notes == []


def test_the_difference_between_the_images_stands_for_each_objective(made):
    study, text = made
    rows = table(study, "objective_differences")
    assert len(rows) == 7
    whole = {(row["line"], row["images"]): row["score"] for row in table(study, "objectives")}
    for row in rows:
        expected = 100 * (whole[row["line"], "animals"] - whole[row["line"], "non-animals"])
        assert row["mean"] == pytest.approx(expected)
    assert "Animal minus non-animal pre-training images, in percentage points of the test score" in text


def test_what_was_learnt_stands_beside_what_needs_no_learning(made):
    study, _ = made
    rows = table(study, "objective_scores")
    last = {(row["line"], row["images"]): row for row in rows if row["words"].startswith(("loss", "cross"))}
    assert {line for line, _ in last} == {"MAE", "DINO", "labels"}
    for row in last.values():
        words, _, value = row["trivial"].rpartition(" ")
        assert words in ("predicting zero", "all the same", "label prior")
        assert row["last"] < float(value)


def test_figures_of_both_sweeps_are_drawn(made):
    study, text = made
    for name in ("objectives", "sizes"):
        assert f"{name}.png" in text
        assert (study.path / f"{name}.png").stat().st_size > 10_000


def test_the_number_of_images_ends_with_the_studys_own_arms_and_has_a_slope(made):
    study, _ = made
    rows = table(study, "sizes")
    assert [(row["arm"], row["share"]) for row in rows] == list(
        itertools.product(["animals", "non-animals"], [1, 5, 10, 50, 100])
    )
    slopes = table(study, "sizes_slope")
    assert len(slopes) == 2
    assert all(row["slope"] > 0 for row in slopes)


def test_a_run_of_another_length_is_named_and_left_out(tmp_path):
    folder = write_study(tmp_path / "study", seeds=(0,), sweeps=("objective",), n=40, epochs=3)
    path = folder / "seed0/pretrain_objective_tokens_animal/config.json"
    config = json.loads(path.read_text())
    config["updates"] += 1
    path.write_text(json.dumps(config))
    study = Study(folder)
    points = objective_sweep.read_sweep(study, SEGMENT)
    assert len(points) == 13
    assert any("`seed0/finetune_objective_tokens_animal` has other settings or updates" in note for note in study.notes)
