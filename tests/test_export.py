"""Exported weights are, in the hands of timm, transformers and facebookresearch/mae's layout, the same networks."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import relative_error, spread
from small_runs import REPOSITORY, SMALL, drawn_root, mae_checkpoint, metrics, refusal, run

import engine
import export as export_script
from engine import hash_file
from export import timm_call
from models import BUILDERS, build_mae, build_vit, patchify
from weights import GENERATIONS, load_pretrained, read_checkpoint, reference_keys, transformers_keys

CLOSE = 1e-5
FEW = settings(max_examples=5, deadline=None, database=None, derandomize=True)
ENCODERS = {
    "vit": {"kind": "vit"},
    "segmenter": {"kind": "segmenter"},
    "linear segmenter": {"kind": "segmenter", "head": "linear"},
    "classifier": {"kind": "classifier", "num_classes": 5},
}


@st.composite
def encoder_sizes(draw) -> dict:
    """Draw the sizes of a small ViT."""
    heads = draw(st.integers(1, 3))
    patch = draw(st.sampled_from([4, 8, 16]))
    return {
        "name": "mae_tiny",
        "img_size": patch * draw(st.integers(2, 4)),
        "patch_size": patch,
        "embed_dim": 4 * heads * draw(st.integers(1, 4)),
        "num_heads": heads,
        "depth": draw(st.integers(1, 3)),
        "mlp_ratio": draw(st.sampled_from([2.0, 4.0])),
    }


@st.composite
def decoder_sizes(draw) -> dict:
    """Draw the sizes of a small decoder."""
    heads = draw(st.integers(1, 3))
    return {
        "decoder_embed_dim": 4 * heads * draw(st.integers(1, 4)),
        "decoder_num_heads": heads,
        "decoder_depth": draw(st.integers(1, 2)),
    }


mae_sizes = st.builds(
    lambda encoder, decoder, norm: {**encoder, **decoder, "norm_pix_loss": norm, "kind": "mae"},
    encoder_sizes(),
    decoder_sizes(),
    st.booleans(),
)


def build(config: dict) -> torch.nn.Module:
    """Build the network of a model_config with random values in all its parameters."""
    arguments = {key: value for key, value in config.items() if key not in ("kind", "name")}
    return spread(BUILDERS[config["kind"]](config["name"], **arguments).eval())


def write_checkpoint(folder: Path, config: dict) -> tuple[Path, torch.nn.Module]:
    """Write a checkpoint as the training scripts do, without a run around it -> (path, its network)."""
    model = build(config)
    path = folder / "model.pt"
    torch.save({"model": model.state_dict(), "model_config": config}, path)
    return path, model


def export(to: str, checkpoint: Path, target: Path, *flags) -> str:
    """Run the command -> the Python in the card that it wrote."""
    run("export", "export", f"--to {to}", *flags, checkpoint, target)
    card = target / "README.md" if target.is_dir() else Path(f"{target}.md")
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL).group(1)


def execute(code: str, folder: Path) -> dict:
    """Execute the Python of a card in the folder of its weights -> the names that it has set."""
    names = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(before)
    return names


def images_for(model: torch.nn.Module) -> torch.Tensor:
    return torch.randn(2, 3, *model.img_size, generator=torch.Generator().manual_seed(3))


def features_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_features(images_for(model))


# ---------------------------------------------------------------------------------------------------------------------
# timm


@pytest.mark.parametrize("kind", [*ENCODERS, "mae"])
def test_timm_computes_the_same_features_with_the_call_that_the_card_gives(kind, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")

    @FEW
    @given(encoder_sizes(), st.sampled_from(["encoder.safetensors", "encoder.pth"]))
    def check(sizes, name):
        checkpoint, model = write_checkpoint(tmp_path, {**sizes, **ENCODERS.get(kind, {"kind": kind})})
        names = execute(export("timm", checkpoint, tmp_path / name), tmp_path)
        with torch.no_grad():
            found = names["model"].eval().forward_features(images_for(model))
        assert relative_error(found, features_of(model)) < CLOSE
        names["model"].load_state_dict(read_checkpoint(tmp_path / name), strict=True)

    check()


@pytest.mark.parametrize(
    ("name", "twin", "changed"),
    [
        ("mae_tiny", "vit_tiny_patch16_224", {"depth": 4}),
        ("mae_small", "vit_small_patch16_224", {}),
        ("mae_base", "vit_base_patch16_224", {}),
        ("mae_large", "vit_large_patch16_224", {}),
        ("mae_huge", "vit_huge_patch14_224", {}),
    ],
)
def test_the_named_sizes_are_those_of_timm(name, twin, changed):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = build_vit(name)
        other = timm.create_model(twin, num_classes=0, **changed)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in other.state_dict().items()} == shapes
    if not changed:
        assert timm_call(model, "e.pth") == f"timm.create_model({twin!r}, num_classes=0, checkpoint_path='e.pth')"


def test_timm_can_average_the_encoders_tokens_where_the_norm_stays_in_its_place(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = {"kind": "classifier", "name": "mae_tiny", "num_classes": 3, **sizes}
    checkpoint, model = write_checkpoint(tmp_path, config)
    export("timm", checkpoint, tmp_path / "encoder.pth")
    options = {"num_classes": 0, "global_pool": "avg", "fc_norm": False}
    twin = timm.create_model("vit_base_patch16_224", checkpoint_path=tmp_path / "encoder.pth", **sizes, **options)
    with torch.no_grad():
        found = twin.eval()(images_for(model))
    assert relative_error(found, features_of(model)[:, 1:].mean(1)) < CLOSE


def test_resnet50_goes_to_timm_and_torchvision_and_is_refused_elsewhere_by_name(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torchvision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    config = {"kind": "classifier", "name": "resnet50", "num_classes": 3, "img_size": 64}
    checkpoint, model = write_checkpoint(tmp_path, config)
    for project in ("facebook", "transformers"):
        message = refusal("export", "export", f"--to {project}", checkpoint, tmp_path / "x.pth")
        assert "holds a ResNet-50" in message and "--to timm" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    names = execute(export("timm", checkpoint, tmp_path / "resnet.pth"), tmp_path)
    images = images_for(model)
    with torch.no_grad():
        expected = model.backbone(images)
        assert relative_error(names["model"].eval().forward_features(images), expected) < CLOSE
    assert isinstance(names["model"], timm.models.resnet.ResNet)
    with torch.device("meta"):
        theirs = torchvision.resnet50().state_dict()
    assert theirs.keys() - read_checkpoint(tmp_path / "resnet.pth").keys() == {"fc.weight", "fc.bias"}


# ---------------------------------------------------------------------------------------------------------------------
# transformers


@FEW
@given(mae_sizes, st.sampled_from(GENERATIONS))
def test_the_key_names_of_transformers_are_those_that_are_read(config, generation):
    state = build(config).state_dict()
    layout, back = reference_keys(transformers_keys(state, generation))
    assert layout == "transformers ViTMAE"
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["folder", "mae.safetensors", "mae.pth"])
def test_transformers_reconstructs_the_same_patches_with_the_same_loss(name, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")

    @FEW
    @given(mae_sizes)
    def check(config):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        checkpoint, model = write_checkpoint(tmp_path, config)
        twin = execute(export("transformers", checkpoint, tmp_path / name), tmp_path)["model"].eval()
        assert type(twin).__name__ == "ViTMAEForPreTraining"
        images = images_for(model)
        noise = torch.rand(2, model.num_patches, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            loss, pred, mask = model(images, 0.75, noise)
            found = twin(images, noise=noise)
        assert torch.equal(found.mask, mask)
        assert relative_error(found.logits, pred) < CLOSE
        assert relative_error(found.loss, loss) < CLOSE

    check()


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("name", ["folder", "encoder.safetensors"])
def test_transformers_vit_computes_the_same_features_of_an_encoder(kind, name, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")

    @settings(FEW, max_examples=4)
    @given(encoder_sizes())
    def check(sizes):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        checkpoint, model = write_checkpoint(tmp_path, {**sizes, **ENCODERS[kind]})
        twin = execute(export("transformers", checkpoint, tmp_path / name), tmp_path)["model"].eval()
        assert type(twin).__name__ == "ViTModel"
        with torch.no_grad():
            found = twin(images_for(model)).last_hidden_state
        assert relative_error(found, features_of(model)) < CLOSE

    check()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_from_pretrained_finds_every_key_of_both_generations_and_knows_the_input(generation, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if generation > int(transformers.__version__.split(".")[0]):
        pytest.skip(f"transformers {transformers.__version__} cannot know the names of version {generation}")
    config = {"kind": "mae", "name": "mae_tiny", "img_size": 32, "depth": 1, "decoder_depth": 1, "norm_pix_loss": False}
    checkpoint, model = write_checkpoint(tmp_path, config)
    export("transformers", checkpoint, tmp_path / "mae", f"--keys {generation}")
    read = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "mae", output_loading_info=True)
    assert not any(read[1].values())
    assert {key for key, _ in read[0].named_parameters()} == set(
        transformers_keys(model.state_dict(), 5)
    ) or generation == 4
    assert not read[0].config.norm_pix_loss
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "mae")
    grey = torch.full((3, 40, 50), 124, dtype=torch.uint8)
    pixels = processor(images=grey, return_tensors="pt")["pixel_values"]
    expected = (124 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.allclose(pixels[0].mean((1, 2)), expected, atol=1e-4)


def test_an_autoencoder_that_vitmae_cannot_be_is_refused(tmp_path):
    checkpoint, _ = write_checkpoint(tmp_path, {"kind": "mae", "name": "mae_tiny", "img_size": [32, 48]})
    assert "square ones; export it --to facebook" in refusal(
        "export", "export", "--to transformers", checkpoint, tmp_path / "mae"
    )
    assert not (tmp_path / "mae").exists()


# ---------------------------------------------------------------------------------------------------------------------
# facebookresearch/mae


@pytest.mark.parametrize("name", ["mae.pth", "mae.safetensors"])
def test_facebooks_layout_has_the_complete_autoencoder_and_loads_back(name, tmp_path):
    @FEW
    @given(mae_sizes)
    def check(config):
        checkpoint, model = write_checkpoint(tmp_path, config)
        export("facebook", checkpoint, tmp_path / name)
        content = read_checkpoint(tmp_path / name)
        state = content["model"] if name.endswith(".pth") else content
        assert state.keys() == model.state_dict().keys()
        again = build({**config})
        torch.nn.init.zeros_(again.cls_token)
        report = load_pretrained(again, tmp_path / name)
        assert (report.missing, report.unexpected, report.interpolated) == ([], [], [])
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())

    check()


@pytest.mark.parametrize("kind", ENCODERS)
def test_facebooks_layout_of_another_network_is_its_encoder(kind, tmp_path):
    config = {"name": "mae_tiny", "img_size": 32, **ENCODERS[kind]}
    checkpoint, model = write_checkpoint(tmp_path, config)
    said = run("export", "export", "--to facebook", checkpoint, tmp_path / "encoder.pth")
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    assert state.keys() == build_vit("mae_tiny", img_size=32).state_dict().keys()
    encoder = build_vit("mae_tiny", img_size=32)
    load_pretrained(encoder, tmp_path / "encoder.pth")
    assert torch.equal(features_of(encoder), features_of(model))
    left = len(model.state_dict()) - len(state)
    assert f"left out: {left or 'none'}" in said
    mae = build_mae("mae_tiny", img_size=32)
    assert "the decoder starts fresh" in str(load_pretrained(mae, tmp_path / "encoder.pth"))
    with torch.no_grad():
        assert torch.equal(mae.forward_encoder(patchify(images_for(mae), mae.patch_size)), features_of(model))


# ---------------------------------------------------------------------------------------------------------------------
# The card


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """The folder of a finished pre-training on drawn photos."""
    folder = tmp_path_factory.mktemp("study") / "seed7" / "pretrain_mixed"
    flags = ["--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path_factory.mktemp("cache")]
    small = ["--model mae_tiny", "--split mixed", "--seed 7", "--epochs 1", "--batch_size 8", "--warmup_epochs 0"]
    run("pretrain", *flags, *SMALL, *small, "--mask_ratio 0.5", "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, pretrained) -> Path:
    """The folder of a fine-tuning of it."""
    folder = pretrained.parent / "finetune_mixed"
    flags = ["--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path_factory.mktemp("cache")]
    small = ["--model mae_tiny", "--inputs unit", "--epochs 1", "--batch_size 8", "--warmup_epochs 0"]
    run("finetune", *flags, *SMALL, *small, "--init", pretrained / "model.pt", "--output_dir", folder)
    return folder


def facts_of(card: Path) -> dict[str, str]:
    """Read the named facts of a card."""
    return dict(re.findall(r"^- \*\*(.+?)\*\*: (.*)$", card.read_text(), re.MULTILINE))


def test_the_card_of_a_pre_training_says_where_the_weights_come_from(pretrained, tmp_path):
    target = tmp_path / "mae.safetensors"
    export("transformers", pretrained / "model.pt", target)
    facts = facts_of(tmp_path / "mae.safetensors.md")
    config = json.loads((pretrained / "config.json").read_text())
    split = config["manifest"]["train"]
    assert facts["SHA-256 of the split"] == config["experiment"]["train"] == split["sha256"]
    assert facts["Split"] == f"mixed, {split['entries']} images of which {split['unique']} are different"
    assert facts["Seed"] == "7, of the split 0"
    assert facts["Run"] == "seed7/pretrain_mixed, by pretrain.py"
    assert facts["Objective or task"] == "mae"
    assert facts["Updates"] == f"{config['updates']} of 8 images"
    assert facts["Starting weights"] == "random"
    assert facts["Image size"] == "64 × 64 pixels, RGB"
    assert facts["Patch size"] == "16 × 16 pixels"
    assert "(0.485, 0.456, 0.406)" in facts["Normalisation"]
    assert "split mixed" in facts["Arm"]
    assert "mask_ratio 0.5" in facts["Recipe"] and "model mae_tiny" in facts["Recipe"]
    assert f"{metrics(pretrained)['last']['loss_animal']:.4f}" in facts["Validation"]
    assert f"torch {torch.__version__}" in facts["Versions"]
    assert facts["SHA-256 of mae.safetensors"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert facts["SHA-256 of model.pt, from which it was exported"] == metrics(pretrained)["files"]["model.pt"]
    assert facts["Tensors left out"] == "none"
    assert facts["Code"] == "MIT"
    assert "no photo was used" in facts["Data"] or "drawn by" in facts["Data"]


def test_the_config_of_transformers_has_the_mask_ratio_of_the_run(pretrained, tmp_path):
    export("transformers", pretrained / "model.pt", tmp_path / "mae")
    assert json.loads((tmp_path / "mae/config.json").read_text())["mask_ratio"] == 0.5
    assert {path.name for path in (tmp_path / "mae").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    }
    assert facts_of(tmp_path / "mae/README.md")["SHA-256 of model.safetensors"] == hash_file(
        tmp_path / "mae/model.safetensors"
    )


def test_the_card_of_a_fine_tuning_names_its_start_its_input_and_what_is_left_out(finetuned, pretrained, tmp_path):
    export("timm", finetuned / "model.pt", tmp_path / "encoder.pth")
    facts = facts_of(tmp_path / "encoder.pth.md")
    start = f"{pretrained / 'model.pt'}, SHA-256 {hash_file(pretrained / 'model.pt')}"
    assert facts["Starting weights"] == start
    assert facts["Split"].startswith("pets train, 32 images")
    assert facts["Normalisation"].startswith("none: pixels from 0 to 1")
    assert "decoder_blocks" in facts["Tensors left out"] and "mask_token" in facts["Tensors left out"]
    assert f"IoU {metrics(finetuned)['best']['iou']:.4f}" in facts["Validation"]
    export("transformers", finetuned / "model.pt", tmp_path / "vit")
    assert not json.loads((tmp_path / "vit/preprocessor_config.json").read_text())["do_normalize"]


@pytest.mark.parametrize(
    ("photos", "named"),
    [
        ({"train2017": 118287}, {"MS COCO"}),
        ({"pets": 7349}, {"Oxford-IIIT Pet"}),
        ({"train2017": 118287, "pets": 7349}, {"MS COCO", "Oxford-IIIT Pet"}),
    ],
)
def test_licences_are_those_of_the_photos_that_were_trained_on(photos, named, pretrained, tmp_path):
    shutil.copy(pretrained / "model.pt", tmp_path)
    config = json.loads((pretrained / "config.json").read_text())
    del config["checksum"]
    config["data"]["title"] = "MS COCO 2017"
    config["manifest"]["train"]["photos"] = photos
    (tmp_path / "config.json").write_text(json.dumps(config))
    export("facebook", tmp_path / "model.pt", tmp_path / "out.pth")
    facts = facts_of(tmp_path / "out.pth.md")
    assert named == {"MS COCO", "Oxford-IIIT Pet"} & set(facts)
    assert "CC BY 4.0" in facts.get("MS COCO", "CC BY 4.0; Flickr") and "Flickr" in facts.get("MS COCO", "Flickr")
    assert facts.get("Oxford-IIIT Pet", "CC BY-SA 4.0") == "CC BY-SA 4.0"
    assert facts["Validation"] == "the run has not ended"


def test_a_lone_checkpoint_is_exported_and_its_card_says_that_its_run_is_unknown(tmp_path, tmp_path_factory):
    path = shutil.copy(mae_checkpoint(tmp_path_factory), tmp_path / "model.pt")
    export("facebook", Path(path), tmp_path / "out.pth")
    card = (tmp_path / "out.pth.md").read_text()
    assert "Its run is unknown" in card and "CC BY-SA 4.0" in card and "Flickr" in card
    assert "Seed" not in facts_of(tmp_path / "out.pth.md")


def test_a_checkpoint_that_is_not_what_its_run_wrote_is_refused(finetuned, tmp_path):
    folder = shutil.copytree(finetuned, tmp_path / "run")
    shutil.copy(finetuned.parent / "pretrain_mixed" / "model.pt", folder)
    message = refusal("export", "export", "--to facebook", folder / "model.pt", tmp_path / "out.pth")
    assert "is not what its run has written" in message
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("content", ["{}", "{", "[]", '{"args": 3, "data": {"title": 7}}'])
def test_records_that_are_none_are_refused_by_name(content, pretrained, tmp_path):
    shutil.copy(pretrained / "model.pt", tmp_path)
    (tmp_path / "config.json").write_text(content)
    message = refusal("export", "export", "--to facebook", tmp_path / "model.pt", tmp_path / "out.pth")
    assert "config.json" in message
    assert not (tmp_path / "out.pth").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Wrong use


def test_a_missing_safetensors_is_one_line_that_says_what_works_without_it(tmp_path, tmp_path_factory, monkeypatch):
    checkpoint = mae_checkpoint(tmp_path_factory)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for project, name in (("timm", "encoder.safetensors"), ("transformers", "folder")):
        message = refusal("export", "export", f"--to {project}", checkpoint, tmp_path / name)
        assert "pip install safetensors" in message and ".pth" in message
    assert list(tmp_path.iterdir()) == []
    for project in ("timm", "transformers", "facebook"):
        run("export", "export", f"--to {project}", checkpoint, tmp_path / f"{project}.pth")
    (tmp_path / "encoder.safetensors").write_bytes(b"12345678")
    message = refusal("finetune", "--model mae_tiny", "--init", tmp_path / "encoder.safetensors")
    assert "encoder.safetensors needs the package safetensors" in message


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x10" + bytes(40), b"\xff" * 100])
def test_a_damaged_file_of_safetensors_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no checkpoint") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="does not exist"):
        read_checkpoint(tmp_path / "absent.safetensors")


def test_nothing_that_is_there_is_replaced_but_an_earlier_export(pretrained, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    lone = shutil.copy(pretrained / "model.pt", tmp_path / "lone.pt")
    (tmp_path / "taken.pth.md").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    refused = [
        ("facebook", folder / "model.pt", folder / "model.pt", "is the file of a run"),
        ("facebook", lone, lone, "is the file of a run"),
        ("timm", lone, folder / "reconstruction.png", "is the file of a run"),
        ("timm", lone, folder, "is not a file that could be replaced"),
        ("timm", lone, tmp_path / "taken.pth", "is not a file that could be replaced"),
        ("timm", lone, "/dev/null", "is not a file that could be replaced"),
        ("transformers", lone, folder, "and is no export; choose another folder"),
        ("transformers", lone, tmp_path / "notes.txt", "is a file; transformers reads a folder"),
        ("timm", tmp_path / "absent.pt", tmp_path / "out.pth", "does not exist"),
        ("timm", lone, tmp_path / "notes.txt", "exists and is no export of weights"),
        ("timm", tmp_path / "notes.txt", tmp_path / "out.pth", "is not a checkpoint of tensors"),
    ]
    for project, checkpoint, target, reason in refused:
        assert reason in refusal("export", "export", f"--to {project}", checkpoint, target)
    assert "--keys 4 belongs to --to transformers" in refusal(
        "export", "export", "--to timm", "--keys 4", lone, tmp_path / "out.pth"
    )
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "lone.pt", "taken.pth.md", "notes.txt"}
    for _ in range(2):
        export("transformers", folder / "model.pt", tmp_path / "mae")
        export("facebook", folder / "model.pt", tmp_path / "mae.pth")


@pytest.mark.parametrize("project", ["timm", "transformers"])
@pytest.mark.parametrize("target", ["", ".", "..", "/", "/dev/full", "notes.txt/x.pth", "n" * 300 + ".pth", "lone.pt"])
def test_an_odd_name_is_refused_in_one_line(project, target, tmp_path, tmp_path_factory, monkeypatch):
    shutil.copy(mae_checkpoint(tmp_path_factory), tmp_path / "lone.pt")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    words = ["export", "--to", project, "lone.pt", target]
    with pytest.raises((ValueError, OSError)) as caught:
        export_script.main(export_script.get_args_parser().parse_args(words))
    failure = engine.explain(caught.value)
    assert failure.exit_code in (1, 2) and "\n" not in failure.message
    assert {path.name for path in tmp_path.iterdir()} == {"lone.pt", "notes.txt"}


def test_a_full_disk_leaves_the_export_that_is_there(pretrained, tmp_path, monkeypatch):
    export("facebook", pretrained / "model.pt", tmp_path / "mae.pth")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run("export", "export", "--to timm", pretrained / "model.pt", tmp_path / "mae.pth")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_command_of_weights_py_exports(pretrained, tmp_path):
    words = ["weights.py", "export", "--to", "facebook", str(pretrained / "model.pt"), str(tmp_path / "mae.pth")]
    command = [sys.executable, str(REPOSITORY / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in the form of facebookresearch/mae" in done.stdout
    assert set(torch.load(tmp_path / "mae.pth", weights_only=True)) == {"model"}
