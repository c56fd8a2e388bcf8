"""Loading weights: every public layout gives the same features, and damaged or hostile files are refused in one line."""

import os
import pickle

import pytest
import torch
from small_models import SMALL, SMALL_ENCODER, encode, encoder_only, transformers_mae

from models import (
    BUILDERS,
    Classifier,
    LinearSegmenter,
    MAESegmenter,
    MaskedAutoencoder,
    ViT,
    build_mae,
    build_segmenter,
    build_vit,
    patchify,
)
from weights import CheckpointError, load_model, load_pretrained, read_checkpoint


@pytest.fixture
def trained():
    """A model in which no parameter has its initial value."""
    torch.manual_seed(1)
    model = MaskedAutoencoder(**SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.forward_encoder(patchify(images, 8))
        return features, model.forward_decoder(features)


def old_transformers_name(key: str) -> str:
    """Rename a key of the present transformers' ViTMAE to that of its version 4."""
    names = {"vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query"}
    names |= {"attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value"}
    names |= {"attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for new, old in names.items():
        key = key.replace(new, old)
    return key


def transformers_state(model, generation: int) -> dict:
    """Write a model's weights under the key names of transformers' ViTMAE, version 4 or 5."""
    state = {}
    names = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}
    names |= {f"patch_embed.proj.{x}": f"vit.embeddings.patch_embeddings.projection.{x}" for x in ("weight", "bias")}
    names |= {f"norm.{x}": f"vit.layernorm.{x}" for x in ("weight", "bias")}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    inner |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] not in ("blocks", "decoder_blocks"):
            state[names.get(key, f"decoder.{key}")] = value
            continue
        prefix = f"{'vit.layers' if parts[0] == 'blocks' else 'decoder.decoder_layers'}.{parts[1]}."
        module, leaf = ".".join(parts[2:-1]), parts[-1]
        if module == "attn.qkv":
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[f"{prefix}attention.{name}_proj.{leaf}"] = part
        else:
            state[f"{prefix}{inner[module]}.{leaf}"] = value
    return state if generation == 5 else {old_transformers_name(k): v for k, v in state.items()}


LAYOUTS = {
    "this project": lambda m: {
        "model": m.state_dict(),
        "model_config": {"kind": "mae"},
        "step": 3,
        "args": {"lr": 0.1},
    },
    "FAIR full": lambda m: {"model": m.state_dict()},
    "bare": lambda m: m.state_dict(),
    "DDP": lambda m: {"state_dict": {f"module.{k}": v for k, v in m.state_dict().items()}},
    "compiled": lambda m: {"model": {f"_orig_mod.{k}": v for k, v in m.state_dict().items()}},
    "transformers 4": lambda m: transformers_state(m, 4),
    "transformers 5": lambda m: transformers_state(m, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_checkpoint_of_any_layout_gives_the_same_outputs(layout, trained, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(LAYOUTS[layout](trained), path)
    model = MaskedAutoencoder(**SMALL)
    report = load_pretrained(model, str(path))
    assert (report.missing, report.unexpected, report.interpolated) == ([], [], [])
    assert len(report.loaded) == len(model.state_dict())
    for own, expected in zip(outputs(model), outputs(trained), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_encoder_only_file_gives_the_same_features_and_says_that_the_decoder_starts_fresh(
    wrapped, trained, tmp_path
):
    state = encoder_only(trained.state_dict())
    path = tmp_path / "mae_pretrain_vit_base.pth"
    torch.save({"model": state} if wrapped else state, path)
    model = MaskedAutoencoder(**SMALL)
    report = load_pretrained(model, str(path))
    assert torch.equal(outputs(model)[0], outputs(trained)[0])
    assert "decoder starts fresh" in str(report)
    assert all(k.startswith(("decoder", "mask_token")) for k in report.missing)
    assert "mask_token" in report.missing


def test_transformers_own_state_dict_has_the_key_names_that_are_understood(trained):
    keys = set(transformers_mae(**SMALL).state_dict())
    assert keys in (set(transformers_state(trained, 4)), set(transformers_state(trained, 5)))


@pytest.mark.parametrize("generation", [4, 5])
def test_transformers_encoder_alone_gives_the_same_features(generation, trained):
    state = transformers_state(trained, generation)
    state = {k.removeprefix("vit."): v for k, v in state.items() if k.startswith("vit.")}  # ViTMAEModel's keys
    model = MaskedAutoencoder(**SMALL)
    report = load_pretrained(model, state)
    assert report.layout == "transformers ViTMAE"
    assert torch.equal(outputs(model)[0], outputs(trained)[0])
    assert "decoder starts fresh" in str(report)


def test_of_an_unfinished_run_with_a_teacher_it_is_the_teacher_that_is_loaded(trained):
    encoder = {key: value for key, value in trained.state_dict().items() if not key.startswith(("decoder", "mask"))}
    student = {key: torch.zeros_like(value) for key, value in encoder.items()}
    model = ViT(**SMALL_ENCODER)
    load_pretrained(model, {"model": student, "optimizer": {}, "objective": {"teacher": encoder}})
    assert torch.equal(model.state_dict()["norm.weight"], encoder["norm.weight"])


def test_timm_state_dict_gives_timms_features():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    vit = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ).eval()
    model = MaskedAutoencoder(**SMALL)
    report = load_pretrained(model, vit.state_dict())
    assert report.unexpected == ["head.weight", "head.bias"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, features = vit.forward_features(images), model.forward_encoder(patchify(images, 8))
    assert (features - expected).norm() <= 1e-5 * expected.norm()


def test_loading_does_not_change_the_given_state_dict(trained):
    state = trained.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    load_pretrained(MAESegmenter(**{**SMALL, "img_size": 64}), state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[k], before[k]) for k in state)


def test_resnet50_weights_load_and_an_imagenet_classifier_is_unexpected():
    model, source = build_segmenter("resnet50"), build_segmenter("resnet50")
    report = load_pretrained(model, {"model": source.state_dict()})
    assert report.missing == []
    assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight)


@pytest.mark.parametrize(
    "state", [{}, {"fc.weight": torch.zeros(2, 2)}, {"epoch": 3}, {"cls_token": torch.zeros(1, 1, 32)}]
)
def test_a_state_with_nothing_in_common_is_refused(state):
    with pytest.raises(CheckpointError, match="no layer in common"):
        load_pretrained(MaskedAutoencoder(**SMALL), state)


@pytest.mark.parametrize(("found", "needed"), [("mae_small", "mae_tiny"), ("mae_tiny", "mae_small")])
def test_a_wrong_size_names_the_model_that_fits(found, needed):
    sizes = dict(img_size=32)
    with pytest.raises(CheckpointError, match=f"fits --model {found}"):
        load_pretrained(build_mae(needed, **sizes), build_mae(found, **sizes).state_dict())


def test_a_refused_checkpoint_leaves_the_model_untouched(trained):
    model = MaskedAutoencoder(**{**SMALL, "decoder_embed_dim": 32})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="another model size"):
        load_pretrained(model, trained.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Encoders alone, in and out

NETWORKS = {
    "encoder": lambda: ViT(**SMALL_ENCODER),
    "autoencoder": lambda: MaskedAutoencoder(**SMALL),
    "segmenter": lambda: MAESegmenter(**SMALL),
    "linear segmenter": lambda: LinearSegmenter(**SMALL_ENCODER),
    "classifier": lambda: Classifier(5, **SMALL_ENCODER),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_checkpoint_of_an_encoder_loads_into_every_network(network, trained):
    state = encoder_only(trained.state_dict())
    config = {"kind": "vit", "name": "mae_tiny", "img_size": 32}
    model = NETWORKS[network]()
    before = model.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    report = load_pretrained(model, {"model": state, "model_config": config})
    assert report.layout == "this project"
    assert set(report.loaded) == set(state)
    assert report.unexpected == []
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encode(model, images), encode(trained, images))
    for key in (*report.missing, *report.new_head):
        assert torch.equal(model.state_dict()[key], before[key])
    assert ("the decoder starts fresh" in str(report)) == hasattr(model, "decoder_blocks")


@pytest.mark.parametrize("network", NETWORKS)
def test_part_encoder_leaves_the_decoder_of_a_checkpoint_aside(network, trained):
    model = NETWORKS[network]()
    encoder = set(encoder_only(trained.state_dict()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_pretrained(model, trained.state_dict(), part="encoder")
    assert set(report.loaded) == encoder
    assert report.unexpected == []
    assert set(report.missing + report.new_head) == set(before) - encoder
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key] if key in encoder else before[key]), key


def test_part_encoder_fits_a_model_with_another_decoder(trained):
    model = MaskedAutoencoder(**{**SMALL, "decoder_embed_dim": 32, "img_size": 64})
    report = load_pretrained(model, trained.state_dict(), part="encoder")
    assert report.interpolated == ["pos_embed"]
    assert "the decoder starts fresh" in str(report)


def test_an_unknown_part_is_refused(trained):
    with pytest.raises(ValueError, match="part must be one of all, encoder, got 'decoder'"):
        load_pretrained(MaskedAutoencoder(**SMALL), trained.state_dict(), part="decoder")


@pytest.mark.parametrize("network", ["segmenter", "linear segmenter", "classifier"])
def test_a_fine_tuned_network_is_a_source_of_its_encoder(network, trained):
    source = NETWORKS[network]()
    load_pretrained(source, trained.state_dict())
    kind = "classifier" if network == "classifier" else "segmenter"
    content = {"model": source.state_dict(), "model_config": {"kind": kind, "img_size": 32}}
    images = torch.randn(2, 3, 32, 32)
    for make in NETWORKS.values():
        model = make()
        report = load_pretrained(model, content)
        assert not any(key.startswith(("decoder_pred", "head")) for key in report.loaded)
        assert torch.equal(encode(model, images), encode(trained, images))


def test_an_encoder_alone_reads_a_full_checkpoint_and_names_what_it_has_no_place_for():
    source = build_mae("mae_tiny", img_size=32)
    report = load_pretrained(build_vit("mae_tiny", img_size=64), source.state_dict())
    assert report.interpolated == ["pos_embed"]
    assert report.missing == report.new_head == []
    assert all(key.startswith(("decoder", "mask_token")) for key in report.unexpected)


def test_resnet50_reads_this_projects_own_checkpoint():
    source, model = build_segmenter("resnet50", img_size=64), build_segmenter("resnet50", img_size=64)
    config = {"kind": "segmenter", "name": "resnet50", "img_size": 64}
    report = load_pretrained(model, {"model": source.state_dict(), "model_config": config})
    assert (report.missing, report.unexpected, report.new_head) == ([], [], [])


@pytest.mark.parametrize("table", [torch.zeros(2, 17, 32), torch.zeros(1, 0, 32), torch.zeros(17, 32)])
def test_position_embeddings_of_an_odd_shape_are_refused_in_one_line(table, trained):
    state = trained.state_dict() | {"pos_embed": table}
    with pytest.raises(CheckpointError, match="pos_embed is") as caught:
        load_pretrained(MaskedAutoencoder(**SMALL), state)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are damaged, foreign or hostile


class Attack:
    """Runs a shell command when an unsafe loader opens it."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(legacy, trained, tmp_path):
    path, witness = tmp_path / "evil.pth", tmp_path / "witness"
    content = {"model": trained.state_dict(), "evil": Attack(f"touch {witness}")}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"could run code, so it is refused") as caught:
        load_pretrained(MaskedAutoencoder(**SMALL), str(path))
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    torch.load(path, weights_only=False)  # the attack is real: an unsafe load does run it
    assert witness.exists()


def test_a_bare_pickle_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    path, witness = tmp_path / "evil.pkl", tmp_path / "witness"
    path.write_bytes(pickle.dumps({"model": Attack(f"touch {witness}")}, protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(str(path))
    assert not witness.exists()


def damage(name: str, path, state: dict) -> None:
    torch.save({"model": state}, path)
    whole = path.read_bytes()
    if name == "truncated in the middle":
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "truncated at the end":
        path.write_bytes(whole[:-30])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "text":
        path.write_text("<html><body>404 Not Found</body></html>\n" * 50)
    elif name == "zeros":
        path.write_bytes(bytes(len(whole)))
    elif name == "a list":
        torch.save([1, 2, 3], path)
    elif name == "a tensor":
        torch.save(torch.zeros(3), path)
    elif name == "a folder":
        path.unlink()
        path.mkdir()
    elif name == "absent":
        path.unlink()


DAMAGES = ["truncated in the middle", "truncated at the end", "empty", "text", "zeros", "a list", "a tensor"]


@pytest.mark.parametrize("name", [*DAMAGES, "a folder", "absent"])
@pytest.mark.parametrize("load", [load_model, lambda path: load_pretrained(MaskedAutoencoder(**SMALL), path)])
def test_a_damaged_file_gives_one_clear_line_that_names_it(name, load, trained, tmp_path):
    path = tmp_path / "weights.pth"
    damage(name, path, trained.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 300
    assert "weights_only" not in message  # never pass on the advice to load it unsafely
    assert caught.value.exit_code == 2


def test_non_tensor_weights_are_ignored_and_named_as_nothing_in_common():
    with pytest.raises(CheckpointError, match="no layer in common"):
        load_pretrained(MaskedAutoencoder(**SMALL), {"model": {"blocks.0.norm1.weight": [1.0, 2.0]}})


# ---------------------------------------------------------------------------------------------------------------------
# This project's own files


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "mae", "name": "mae_tiny", "img_size": 32},
        {"kind": "mae", "name": "mae_tiny", "img_size": [32, 48], "norm_pix_loss": False},
        {"kind": "segmenter", "name": "mae_tiny", "img_size": 32, "num_classes": 4, "drop_path": 0.1},
        {"kind": "segmenter", "name": "mae_tiny", "img_size": 32, "head": "linear"},
        {"kind": "segmenter", "name": "resnet50", "img_size": 32},
        {"kind": "vit", "name": "mae_tiny", "img_size": [32, 48]},
        {"kind": "classifier", "name": "mae_tiny", "img_size": 32, "num_classes": 5, "pooling": "cls"},
        {"kind": "classifier", "name": "resnet50", "img_size": 32, "num_classes": 5},
    ],
)
def test_a_model_is_rebuilt_from_its_own_checkpoint(config, tmp_path):
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k not in ("kind", "name")}
    model = BUILDERS[config["kind"]](config["name"], **sizes).eval()
    path = tmp_path / "model.pt"
    torch.save({"model": model.state_dict(), "model_config": config, "step": 7}, path)
    rebuilt, content = load_model(str(path))
    images = torch.randn(1, 3, *model.img_size)
    with torch.no_grad():
        if config["kind"] == "mae":
            own = rebuilt.reconstruct(images, 0)[1]
            expected = model.reconstruct(images, 0)[1]
        else:
            own = rebuilt(images)
            expected = model(images)
    assert torch.equal(own, expected)
    assert content["step"] == 7
    assert not rebuilt.training


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        {"model_config": {"kind": "mae", "name": "mae_tiny"}},
        {"model": {}, "model_config": {"kind": "mae", "name": "mae_gigantic"}},
        {"model": {}, "model_config": {"kind": "mae", "name": "mae_tiny", "colour": 3}},
        {"model": {}, "model_config": {"kind": "mae", "name": "mae_tiny", "img_size": 32}},
        {"model": {}, "model_config": {"kind": "mae", "name": "mae_tiny", "img_size": 33}},
        {"model": {}, "model_config": {}},
        {"model": {}, "model_config": {"kind": "painter", "name": "mae_tiny"}},
        {"model": [], "model_config": {"kind": "mae", "name": "mae_tiny"}},
    ],
)
def test_a_checkpoint_that_does_not_describe_its_model_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_positions_of_another_grid_with_as_many_patches_are_interpolated():
    wide, square = build_segmenter("mae_tiny", img_size=(32, 128)), build_mae("mae_tiny", img_size=64)
    report = load_pretrained(wide, square.state_dict())
    assert report.interpolated == ["pos_embed", "decoder_pos_embed"]
    assert not torch.equal(wide.pos_embed, square.pos_embed)
    again = build_mae("mae_tiny", img_size=(32, 128))
    own = {"model": wide.state_dict(), "model_config": {"kind": "segmenter", "img_size": [32, 128]}}
    assert load_pretrained(again, own).interpolated == [] and torch.equal(again.pos_embed, wide.pos_embed)


def test_a_class_head_is_never_taken_for_the_pixel_predictor():
    segmenter, mae = build_segmenter("mae_tiny", img_size=32), build_mae("mae_tiny", img_size=32)
    before = mae.decoder_pred.weight.clone()
    config = {"kind": "segmenter", "img_size": 32}
    report = load_pretrained(mae, {"model": segmenter.state_dict(), "model_config": config})
    assert report.new_head == ["decoder_pred.weight", "decoder_pred.bias"] and torch.equal(
        mae.decoder_pred.weight, before
    )


def test_a_path_object_loads_like_a_path(tmp_path):
    model = build_mae("mae_tiny", img_size=32)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert not load_pretrained(build_mae("mae_tiny", img_size=32), tmp_path / "a.pth").missing


@pytest.mark.parametrize("kept", [2, 1])
def test_an_encoder_of_another_depth_is_refused(kept):
    model = build_mae("mae_tiny", img_size=32)
    cut = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.") or int(k.split(".")[1]) < kept}
    with pytest.raises(CheckpointError, match=f"{kept} encoder blocks, the model needs 4"):
        load_pretrained(build_mae("mae_tiny", img_size=32), cut)


@pytest.mark.parametrize(
    "odd", [{0: torch.zeros(2)}, {"cls_token": torch.tensor(1.0)}, {"cls_token": torch.eye(2).to_sparse()}]
)
def test_odd_tensors_and_keys_are_refused_in_one_line(odd):
    with pytest.raises(CheckpointError) as error:
        load_pretrained(build_mae("mae_tiny", img_size=32), odd)
    assert "\n" not in str(error.value)


def test_a_pipe_in_the_place_of_a_checkpoint_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="is no file but a folder, pipe or device"):
        read_checkpoint(tmp_path / "pipe.pt")
