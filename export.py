"""Weights of this project in the forms that people use elsewhere, each with a card that says where they come from.

    python weights.py export --to timm runs/study/seed0/pretrain_animal/model.pt encoder.safetensors
    python weights.py export --to transformers runs/study/seed0/pretrain_animal/model.pt mae_animal    # a folder
    python weights.py export --to facebook runs/study/seed0/finetune_animal/model.pt encoder.pth

A Masked Autoencoder is exported whole to transformers and to facebookresearch/mae. Of other networks, and to timm, the
encoder is exported alone: what follows it has no counterpart there. ResNet-50 goes to timm, with torchvision's keys.
"""

import argparse
import hashlib
import io
import json
from pathlib import Path

import torch
from torch import nn

from augment import MEAN, STD
from card import FORM, Exported, Run, find_run, make_card
from engine import EngineError, Parser, hash_file, launch, write_atomic
from models import MAESegmenter, MaskedAutoencoder, ViT
from weights import (
    GENERATIONS,
    State,
    encoder_state,
    identify,
    import_safetensors,
    load_model,
    recorded_hash,
    summarise_keys,
    transformers_keys,
)

PROJECTS = {"timm": "timm", "transformers": "transformers", "facebook": "facebookresearch/mae"}
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")  # any other name is a folder, where one is possible
FOLDER_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")

# timm's plain ViTs for images of 224 pixels.
TIMM_SIZES = {
    "vit_tiny_patch16_224": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small_patch16_224": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base_patch16_224": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large_patch16_224": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge_patch14_224": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}

# ---------------------------------------------------------------------------------------------------------------------
# Which weights, under which keys


def is_autoencoder(model: nn.Module) -> bool:
    """Tell whether a network predicts pixels, so that its decoder is of use to others."""
    return isinstance(model, MaskedAutoencoder) and not isinstance(model, MAESegmenter)


def exported_part(model: nn.Module, to: str) -> State:
    """Choose the weights that have a counterpart in a form."""
    state = model.state_dict()
    if is_autoencoder(model) and to != "timm":
        return state
    return encoder_state(state)


def rename(state: State, to: str, generation: int) -> State:
    """Rename weights to the keys of a form, whose modules they then fit strictly."""
    if to == "timm":
        return {key.removeprefix("backbone."): value for key, value in state.items()}
    if to == "facebook":
        return state
    renamed = transformers_keys(state, generation)
    if "mask_token" in state:
        return renamed
    return {key.removeprefix("vit."): value for key, value in renamed.items()}  # ViTModel


def check_form(model: nn.Module, to: str, path: Path) -> None:
    """Refuse a network that a form has no place for."""
    if not isinstance(model, ViT) and to != "timm":
        raise EngineError(f"{path} holds a ResNet-50, which {PROJECTS[to]} has no form for; export it --to timm")
    if to != "transformers" or not is_autoencoder(model):
        return
    height, width = model.img_size
    pixels = model.patch_size**2 * model.patch_embed.proj.in_channels
    if height != width or model.decoder_pred.out_features != pixels:
        problem = f"{path} predicts {model.decoder_pred.out_features} values a patch of {height} x {width} images"
        advice = "transformers' ViTMAE predicts the input of square ones; export it --to facebook"
        raise EngineError(f"{problem}; {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# How others build the network


def timm_call(model: nn.Module, file: str) -> str:
    """Write the call that makes timm's network of the same size and loads a file into it."""
    arguments = {"num_classes": 0, "checkpoint_path": file}
    if not isinstance(model, ViT):
        return f"timm.create_model('resnet50', {as_arguments(arguments)})"
    sizes = {
        "patch_size": model.patch_size,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
    }
    name = "vit_base_patch16_224"
    for candidate in TIMM_SIZES:
        if TIMM_SIZES[candidate]["embed_dim"] == model.embed_dim:
            name = candidate
    sizes |= {
        "img_size": model.img_size,
        "in_chans": model.patch_embed.proj.in_channels,
        "mlp_ratio": model.blocks[0].mlp.fc1.out_features / model.embed_dim,
    }
    usual = {**TIMM_SIZES[name], "img_size": (224, 224), "in_chans": 3, "mlp_ratio": 4}
    for key, value in sizes.items():
        if value != usual[key]:
            arguments[key] = value
    return f"timm.create_model({name!r}, {as_arguments(arguments)})"


def transformers_config(model: ViT, mask_ratio: float) -> dict:
    """Describe a network as the config.json of transformers' ViTMAEForPreTraining, or of ViTModel for an encoder."""
    first = model.blocks[0]
    height, width = model.img_size
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": first.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": True,
    }
    if not is_autoencoder(model):
        return config
    first = model.decoder_blocks[0]
    decoder = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": first.attn.proj.in_features,
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": first.attn.num_heads,
        "decoder_intermediate_size": first.mlp.fc1.out_features,
        "mask_ratio": mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
    }
    return {**config, **decoder}


def preprocessor_config(model: ViT) -> dict:
    """Describe how images are resized and scaled, as transformers' image processors read it."""
    height, width = model.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic, as the decoded cache
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": getattr(model, "inputs", "imagenet") == "imagenet",
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def as_arguments(values: dict) -> str:
    """Write values as the keyword arguments of a Python call."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


# ---------------------------------------------------------------------------------------------------------------------
# How others load the file


def loading_code(model: nn.Module, to: str, target: Path, config: dict) -> str:
    """Write the Python that loads an export, for the folder in which it lies."""
    if to == "timm":
        return f"import timm\n\nmodel = {timm_call(model, target.name)}"
    read = f"state = torch.load({target.name!r}, weights_only=True)"
    imports = "import torch"
    if target.suffix == ".safetensors":
        read = f"state = safetensors.torch.load_file({target.name!r})"
        imports = "import safetensors.torch"
    if to == "facebook":
        return f"{imports}\n\n{read}  # for its models' load_state_dict, and for load_pretrained of weights.py"
    kind = config["architectures"][0]
    config_kind = kind.replace("ForPreTraining", "Model").replace("Model", "Config")
    options = "" if is_autoencoder(model) else ", add_pooling_layer=False"
    if is_folder(target):
        return f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({target.absolute().name!r}{options})"
    sizes = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    return (
        f"{imports}\nfrom transformers import {config_kind}, {kind}\n\n"
        f"{read}\n"
        f"model = {kind}({config_kind}({as_arguments(sizes)}){options})\n"
        "model.load_state_dict(state)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def is_folder(target: Path) -> bool:
    """Tell whether transformers finds an export in a folder of this name, or a state dict in a file."""
    return target.suffix not in WEIGHT_FILES


def check_target(target: Path, to: str, checkpoint: Path) -> None:
    """Refuse to write where something else is, or what cannot be written, before anything is read."""
    if to == "transformers" and is_folder(target):
        check_folder(target)
        import_safetensors(target / "model.safetensors")
        return
    check_file(target)
    check_file(card_beside(target))
    is_checkpoint = target.exists() and checkpoint.exists() and target.samefile(checkpoint)
    if is_checkpoint or recorded_hash(target) is not None:
        raise EngineError(f"{target} is the file of a run; choose another name")
    check_earlier(target)
    if target.suffix == ".safetensors":
        import_safetensors(target)


def check_file(path: Path) -> None:
    """Refuse a name that something other than a file has."""
    if path.exists() and not path.is_file():
        raise EngineError(f"{path} is not a file that could be replaced; choose another name")


def check_earlier(target: Path) -> None:
    """Refuse to replace what is no earlier export, which its card names by its hash."""
    card = card_beside(target)
    text = card.read_text(errors="replace") if card.exists() else ""
    if target.exists() and hash_file(target) not in text:
        raise EngineError(f"{target} exists and is no export of weights; choose another name, or remove it")
    if text and FORM not in text.split("\n")[0]:
        raise EngineError(f"{card} exists and is no card of weights; choose another name, or remove it")


def check_folder(target: Path) -> None:
    """Refuse a folder that holds something other than an export."""
    if not target.exists():
        return
    if not target.is_dir():
        raise EngineError(
            f"{target} is a file; transformers reads a folder, or a name that ends in .safetensors or .pth"
        )
    for path in target.iterdir():
        if path.name.removesuffix(".tmp") not in FOLDER_FILES:
            raise EngineError(f"{target} holds {path.name} and is no export; choose another folder")


def card_beside(target: Path) -> Path:
    """Name the card of a file of weights."""
    return target.with_name(target.name + ".md")


def serialise(state: State, target: Path, to: str) -> bytes:
    """Give the content of a file of weights: safetensors, or what torch saves of a dictionary."""
    if target.suffix == ".safetensors":
        return import_safetensors(target).torch.save(state, metadata={"format": "pt"})
    if to == "facebook":
        state = {"model": state}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def as_json(content: dict) -> bytes:
    """Write an object as other projects' configuration files have it."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    write_atomic(path, lambda file: file.write(content))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def export(checkpoint: Path, target: Path, to: str, generation: int | None = None) -> Exported:
    """Export a checkpoint of this project's scripts to a form of PROJECTS, and write its card -> what was exported.

    generation: of transformers' key names; by default 4 in a folder, which from_pretrained of both versions reads, and 5
    in a file, for load_state_dict of today's. Raises CheckpointError or EngineError before anything is written.
    """
    check_target(target, to, checkpoint)
    model, content = load_model(checkpoint)
    check_form(model, to, checkpoint)
    run = find_run(checkpoint)
    part = exported_part(model, to)
    in_folder = to == "transformers" and is_folder(target)
    if generation is None:
        generation = 4 if in_folder else 5
    weights = target / "model.safetensors" if in_folder else target
    saved = serialise(rename(part, to, generation), weights, to)
    config = transformers_config(model, mask_ratio_of(run)) if to == "transformers" else {}
    exported = Exported(
        checkpoint=checkpoint,
        checkpoint_sha256=identify(checkpoint),
        model=model,
        name=content["model_config"]["name"],
        project=PROJECTS[to],
        weights=weights,
        weights_sha256=hashlib.sha256(saved).hexdigest(),
        values=sum(value.numel() for value in part.values()),
        left_out=summarise_keys([key for key in model.state_dict() if key not in part]),
        code=loading_code(model, to, target, config),
    )
    card = make_card(exported, run).encode()
    write_bytes(weights, saved)
    if in_folder:
        write_bytes(target / "config.json", as_json(config))
        write_bytes(target / "preprocessor_config.json", as_json(preprocessor_config(model)))
        write_bytes(target / "README.md", card)
    else:
        write_bytes(card_beside(target), card)
    return exported


def mask_ratio_of(run: Run | None) -> float:
    """Give the mask ratio of a pre-training; where it is unknown that of the MAE paper."""
    if run is None or run.mask_ratio is None:
        return 0.75
    return run.mask_ratio


def get_args_parser() -> Parser:
    """Make the parser of `weights.py export`."""
    parser = Parser("weights.py", description="Weights in the forms that people use elsewhere")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a checkpoint in another project's form, and a card beside it")
    command.add_argument(
        "--to",
        choices=list(PROJECTS),
        required=True,
        help="timm: the encoder, for create_model(..., num_classes=0), or ResNet-50; transformers: ViTMAEForPreTraining of "
        "a Masked Autoencoder, ViTModel of another network; facebook: the files of facebookresearch/mae",
    )
    command.add_argument(
        "--keys",
        type=int,
        choices=GENERATIONS,
        help="transformers: the version whose key names are used (default: 4 in a folder, which from_pretrained of both "
        "versions reads; 5 in a file, for load_state_dict)",
    )
    command.add_argument("checkpoint", help="model.pt of a run; what is known of it is read from the files beside it")
    command.add_argument(
        "output",
        help="file to write; its card gets the same name and .md. A name that ends in .safetensors gives that format, "
        "any other torch's. transformers: a folder for from_pretrained, unless the name ends in .safetensors or .pth",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Export a checkpoint."""
    if args.keys is not None and args.to != "transformers":
        raise EngineError(f"--keys {args.keys} belongs to --to transformers; leave it out")
    exported = export(Path(args.checkpoint), Path(args.output), args.to, args.keys)
    print(f"{args.output}: {exported.values:,} values in the form of {exported.project}")
    print(f"tensors left out: {exported.left_out}")
    print(exported.code)


if __name__ == "__main__":
    launch(main, get_args_parser())
