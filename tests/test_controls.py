"""Controls of the study: images without people, the pixels of another image as targets, published weights as an anchor."""

import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL
from small_runs import SMALL as SMALL_RUN
from small_runs import MemoryStore, drawn_root, log, metrics, refusal, run

import arms
import pretrain
import splits
import study as study_script
from batches import Augmentation, Examples, TrainBatches
from data import DataError
from engine import Distributed, setup
from models import MaskedAutoencoder
from study import PlanError, PlanLine, read_args

QUICK = settings(deadline=None, database=None, max_examples=25)


# -- Another image's pixels ---------------------------------------------------------------------------------------------


def batches(
    batch_size: int, rank: int = 0, world_size: int = 1, micro: int | None = None, seed: int = 0
) -> TrainBatches:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (24, 3, 12, 12), dtype=torch.uint8, generator=generator)
    dist = Distributed(rank, rank, world_size, torch.device("cpu"))
    examples = Examples(MemoryStore(pixels), strangers=True)
    return TrainBatches(examples, Augmentation(8), batch_size=batch_size, seed=seed, micro_batch_size=micro, dist=dist)


def joined(parts: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@QUICK
@given(st.sampled_from([2, 3, 4, 8, 12, 24]), st.integers(0, 2**31))
def test_each_image_comes_with_another_one_of_its_batch_and_each_is_one_once(batch_size, seed):
    (batch,) = next(batches(batch_size, seed=seed).run(0, 1))
    same = (batch["strangers"][:, None] == batch["images"][None]).flatten(2).all(2)
    assert not same.diagonal().any()
    assert (same.sum(0) == 1).all()
    assert (same.sum(1) == 1).all()


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, None), (2, 2), (4, 1)])
def test_processes_and_micro_batches_give_the_same_strangers(world_size, micro):
    whole = [joined(parts) for parts in batches(8).run(0, 4)]
    ranks = [list(batches(8, rank, world_size, micro).run(0, 4)) for rank in range(world_size)]
    for step, expected in enumerate(whole):
        found = joined([part for parts in ranks for part in parts[step]])
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    assert not torch.equal(whole[0]["strangers"], whole[1]["strangers"])


def test_strangers_change_no_other_draw():
    store = batches(8).examples.images
    plain = TrainBatches(Examples(store), Augmentation(8), batch_size=8, seed=0)
    for (batch,), (with_strangers,) in zip(plain.run(0, 3), batches(8).run(0, 3), strict=True):
        assert set(batch) == {"images"}
        assert torch.equal(batch["images"], with_strangers["images"])


def test_a_single_image_has_no_other_one():
    with pytest.raises(DataError, match="raise --batch_size"):
        batches(1)


@pytest.mark.parametrize("mask_ratio", [0.75, 0.0])
def test_the_loss_is_that_of_the_other_images_pixels_where_the_image_is_hidden(mask_ratio):
    torch.manual_seed(0)
    model = MaskedAutoencoder(**SMALL, norm_pix_loss=False)
    images = torch.randn(3, 3, 32, 32)
    others = torch.randn(3, 3, 32, 32)
    noise = torch.rand(3, model.num_patches)
    loss = model(images, mask_ratio, noise, loss_only=True, targets=others)
    _, pred, mask = model(images, mask_ratio, noise)
    hidden = mask if mask_ratio else torch.ones_like(mask)
    patches = others.reshape(3, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(3, 16, -1)
    expected = ((pred - patches) ** 2).mean(-1)[hidden == 1].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_predicting_other_images_learns_next_to_nothing_of_an_image(tmp_path, tmp_path_factory):
    words = ["--model", "mae_tiny", *SMALL_RUN, "--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path]
    words += ["--num_images", 8, "--batch_size", 8, "--epochs", 60, "--blr", 4.8e-2, "--clip_grad", 1]
    words += ["--warmup_epochs", 5, "--val_epochs", 60]
    last = {}
    for targets in ("own", "other"):
        run("pretrain", *words, "--targets", targets, "--output_dir", tmp_path / targets)
        last[targets] = log(tmp_path / targets, "train")[-1]["loss"]
    assert last["own"] < last["other"] - 0.02
    assert metrics(tmp_path / "other")["last"]["loss_animal"] > metrics(tmp_path / "own")["last"]["loss_animal"]


# -- Without people -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict:
    return {"data_root": drawn_root(tmp_path_factory), "cache_dir": tmp_path_factory.mktemp("cache")}


@pytest.mark.parametrize("split", ["animal", "non_animal", "mixed", "all"])
def test_no_list_holds_an_image_with_an_excluded_category_and_arms_stay_matched(split, place):
    whole = splits.select_split(split=split, **place)
    without = splits.select_split(split=split, exclude_categories=["person"], **place)
    coco = splits.CocoPart(place["data_root"], "train2017", cache_dir=place["cache_dir"])
    assert any("person" in coco.labels_of(image) for image in coco.images)
    assert not any("person" in coco.labels_of(image) for image in without.images)
    assert without.manifest["person_share"] == 0
    assert without.sha256 != whole.sha256
    animals = splits.select_split(split="animal", exclude_categories=["person"], **place)
    if split != "all":
        assert len(without.images) == len(animals.images)


def test_leaving_images_out_changes_no_epoch_and_no_validation(place):
    flags = ["--data_root", place["data_root"], "--cache_dir", place["cache_dir"], "--model", "mae_tiny", *SMALL_RUN]
    made = []
    for more in ([], ["--exclude_categories", "person", "bottle"]):
        args = pretrain.get_args_parser().parse_args([str(word) for word in (*flags, *more)])
        made.append(pretrain.MaskedPixels(args, setup("cpu")))
    whole, without = made
    assert len(without.split.images) < len(whole.split.images)
    assert without.epoch_images == whole.epoch_images
    assert without.held_out == whole.held_out
    assert without.data_title() == whole.data_title()


def test_an_unknown_category_is_refused_in_one_line(place, tmp_path):
    flags = ["--data_root", place["data_root"], "--cache_dir", place["cache_dir"], "--output_dir", tmp_path / "run"]
    message = refusal("pretrain", *flags, "--exclude_categories", "unicorn")
    assert "unknown category 'unicorn'; valid: " in message
    text = run("prepare", "splits", *flags[:4], "--output", tmp_path / "lists", "--exclude_categories", "person")
    assert "0.0%" in text


# -- Arms ---------------------------------------------------------------------------------------------------------------


def plan(*words) -> list[PlanLine]:
    args = read_args([str(word) for word in ("--dry_run", *words)], "run_all.sh")
    args.on_gpus = False
    return study_script.make_plan(args, paper_sizes=False)


@pytest.mark.parametrize("name", arms.CONTROLS)
def test_a_control_is_a_pre_training_and_its_fine_tuning(name):
    found = {line.stage: line for line in plan("--extra_arms", name) if line.arm == name}
    assert set(found) == {"pretrain", "finetune"}
    assert found["finetune"].parent == found["pretrain"].folder
    words = shlex.split(found["pretrain"].command)
    for flag, value in arms.CONTROLS[name].flags.items():
        assert words[words.index(f"--{flag}") + 1] == value
    pretrain.get_args_parser().parse_args(words[1:])
    assert arms.find_arm("finetune", name).images == arms.CONTROLS[name].images


def test_published_weights_are_fine_tuned_from_the_encoder_alone():
    [line] = [
        line for line in plan("--extra_arms", "imagenet", "--imagenet_weights", "vit.pth") if line.arm == "imagenet"
    ]
    words = shlex.split(line.command)
    assert (line.stage, line.parent) == ("finetune", "")
    assert words[words.index("--init") + 1] == "vit.pth"
    assert words[words.index("--load") + 1] == "encoder"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--extra_arms", "imagenet"], "needs --imagenet_weights FILE"),
        (["--imagenet_weights", "vit.pth"], "is for the arm --extra_arms imagenet"),
        (["--extra_arms", "other_target"], "unknown split --extra_arms 'other_target'"),
    ],
)
def test_an_anchor_without_its_file_and_unknown_controls_are_refused(words, reason):
    with pytest.raises(PlanError, match=reason):
        plan(*words)


def test_a_file_that_is_not_there_is_refused_before_the_study_begins(tmp_path):
    words = ["--extra_arms", "imagenet", "--imagenet_weights", str(tmp_path / "vit.pth")]
    with pytest.raises(PlanError, match="is no file"):
        read_args(words, "run_all.sh")
