"""Reading checkpoints safely, and weights in the layouts of other projects, in and out.

print(load_pretrained(build_segmenter("mae_base"), "mae_pretrain_vit_base.pth"))     # what was loaded, what is new
model, checkpoint = load_model("runs/study/seed0/finetune_animal/model.pt")

python weights.py export --to timm runs/study/seed0/pretrain_animal/model.pt encoder.safetensors     # see export.py
"""

import errno
import json
import math
import os
import pickle
import re
import runpy
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from engine import hash_file, verify_archive
from models import BUILDERS, MODELS, interpolate_pos_embed

PARTS = ("all", "encoder")  # what `load_pretrained` can be asked to load
ENCODER_KEYS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "backbone.")
POSITION_KEYS = ("pos_embed", "decoder_pos_embed")

State = dict[str, torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""

    exit_code = 2


@dataclass
class LoadReport:
    """What `load_pretrained` did, by state-dict key."""

    source: str
    layout: str
    loaded: list[str]
    new_head: list[str]  # never taken from a checkpoint, starts fresh on purpose
    missing: list[str]
    unexpected: list[str]
    interpolated: list[str]  # position embeddings fitted to another grid

    def __str__(self) -> str:
        parts = []
        for name in ("loaded", "new_head", "missing", "unexpected"):
            parts.append(name.replace("_", " ") + " " + summarise_keys(getattr(self, name)))
        if self.interpolated:
            parts.append("positions interpolated: " + ", ".join(self.interpolated))
        if any(key.startswith("decoder_blocks") for key in self.missing):
            parts.append("the decoder starts fresh")
        return f"{self.source} ({self.layout}): " + "; ".join(parts)


def summarise_keys(keys: list[str]) -> str:
    """Describe state-dict keys by their number and the modules that they belong to."""
    if not keys:
        return "none"
    modules = sorted({key.split(".")[0] for key in keys})
    return f"{len(keys)} ({', '.join(modules)})"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint file to CPU memory without running any code in it; CheckpointError if that cannot be done."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"checkpoint {path} is no file but a folder, pipe or device")
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    try:
        if zipfile.is_zipfile(path):  # older formats of torch have no checksums
            verify_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except pickle.UnpicklingError:
        found = f"{path} is not a checkpoint of tensors and plain values only"
        raise CheckpointError(f"{found}; loading it could run code, so it is refused") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # which torch makes of a file that was cut short
            raise CheckpointError(f"checkpoint {path} cannot be opened: {error.strerror}") from None
        raise CheckpointError(f"{path} is damaged or no checkpoint; download or copy it again") from None
    except Exception:  # torch reports damaged archives with many types, and advises to load them unsafely
        raise CheckpointError(f"{path} is damaged or no checkpoint; download or copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def read_safetensors(path: str | os.PathLike) -> State:
    """Read a file of the safetensors format; CheckpointError if that cannot be done or its package is missing."""
    safetensors = import_safetensors(path)
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except (OSError, safetensors.SafetensorError):
        raise CheckpointError(f"{path} is damaged or no checkpoint; download or copy it again") from None


def import_safetensors(path: str | os.PathLike) -> ModuleType:
    """Import the optional package safetensors; CheckpointError that names the file if it is missing."""
    try:
        import safetensors.torch
    except ImportError:
        advice = "install it with `pip install safetensors`, or use a file whose name ends in .pth, which needs nothing"
        raise CheckpointError(f"{path} needs the package safetensors; {advice}") from None
    return safetensors


def identify(path: str | os.PathLike) -> str:
    """Compute the SHA-256 of a checkpoint; CheckpointError if the finished run beside it recorded another."""
    found = hash_file(path)
    if recorded_hash(Path(path)) not in (None, found):
        advice = "bring it back, or move the run's folder away and train it again"
        raise CheckpointError(f"{path} is not what its run has written (see metrics.json beside it); {advice}")
    return found


def recorded_hash(path: Path) -> str | None:
    """Look up the SHA-256 of a file in the record of the finished run that it belongs to; None if it is of no run."""
    try:
        return json.loads((path.parent / "metrics.json").read_text())["files"][path.name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_model(path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """Rebuild a model from a checkpoint that this project's scripts wrote -> (model in eval mode, the full checkpoint)."""
    content = read_checkpoint(path)
    config = content.get("model_config")
    if not isinstance(config, dict) or "model" not in content:
        raise CheckpointError(f"{path} was not written by this project's training scripts (it has no model_config)")
    try:
        model = build_from_config(config)
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not fit the model it names: {reason}") from None
    return model.eval(), content


def build_from_config(config: dict) -> nn.Module:
    """Build the network that a checkpoint's model_config describes: its kind, its name and the builder's arguments."""
    arguments = {}
    for key, value in config.items():
        if isinstance(value, list):  # JSON knows no tuples
            value = tuple(value)
        arguments[key] = value
    build = BUILDERS[arguments.pop("kind")]
    name = arguments.pop("name")
    return build(name, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Loading into another network


def load_pretrained(model: nn.Module, source: str | os.PathLike | dict, part: str = "all") -> LoadReport:
    """Load what fits of a pre-trained network into a network of models.py, and report it.

    source: a path or a loaded dictionary: checkpoints of this project, facebookresearch/mae's full or encoder-only files,
    timm's ViT or transformers' ViTMAE state dicts. part: "encoder" leaves a decoder in the checkpoint aside, "all" takes
    it. Position embeddings are interpolated to the model's grid. Keys under the model's `fresh_keys` are never taken from
    a checkpoint: a class head may have the key and the shape of the pixel predictor.
    Raises CheckpointError if nothing is in common or a shape differs, and leaves the model untouched then.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    name = "state dict"
    content = source
    if not isinstance(source, dict):
        name = str(source)
        content = read_checkpoint(source)
    config = model_config_of(content)
    layout, state = reference_keys(content)
    if part == "encoder":
        state = encoder_state(state)

    own = model.state_dict()
    new_head = match_fresh_keys(own, model, config)
    shared = [key for key in own if key in state and key not in new_head]
    check_common_layers(name, state, shared)
    interpolated = fit_positions(state, own, shared, model, config)
    check_shapes(name, state, own, shared)
    check_depth(name, state, own)
    model.load_state_dict({key: state[key] for key in shared}, strict=False)

    missing = [key for key in own if key not in state and key not in new_head]
    unexpected = [key for key in state if key not in own]
    return LoadReport(name, layout, shared, new_head, missing, unexpected, interpolated)


def model_config_of(content: dict) -> dict:
    """Return the description of the network in one of this project's checkpoints, or {} for other files."""
    config = content.get("model_config")
    if isinstance(config, dict):
        return config
    return {}


def match_fresh_keys(own: State, model: nn.Module, config: dict) -> list[str]:
    """List the model's keys that are never taken from this checkpoint."""
    prefixes = tuple(model.fresh_keys)
    if config.get("kind") == "segmenter":
        prefixes += ("decoder_pred.",)  # it predicts classes there, pixels in a Masked Autoencoder
    return [key for key in own if key.startswith(prefixes)]


def check_common_layers(name: str, state: State, shared: list[str]) -> None:
    """Refuse a checkpoint that has no encoder layer in common with the model."""
    if any(key.startswith(("blocks.", "backbone.")) for key in shared):
        return
    keys = ", ".join(list(state)[:3]) or "none"
    raise CheckpointError(f"{name} has no layer in common with the model (its keys: {keys} ...)")


def fit_positions(state: State, own: State, shared: list[str], model: nn.Module, config: dict) -> list[str]:
    """Interpolate the position embeddings in `state` to the model's grid -> the keys that it changed."""
    interpolated = []
    for key in shared:
        if key not in POSITION_KEYS or not is_position_table(state[key], own[key].shape[2]):
            continue
        num_patches = state[key].shape[1] - 1
        grid = source_grid(num_patches, config, model.patch_size)
        if grid is not None and grid != model.grid:
            state[key] = interpolate_pos_embed(state[key], grid, model.grid)
            interpolated.append(key)
    return interpolated


def is_position_table(tensor: torch.Tensor, dim: int) -> bool:
    """Say whether a tensor has the shape [1, 1 + L, dim] of position embeddings, with L >= 1."""
    return tensor.ndim == 3 and tensor.shape[0] == 1 and tensor.shape[1] >= 2 and tensor.shape[2] == dim


def source_grid(num_patches: int, config: dict, patch_size: int) -> tuple[int, int] | None:
    """Infer the patch grid (rows, columns) of a checkpoint; a square where it does not say, None if that is impossible."""
    img_size = config.get("img_size")
    if isinstance(img_size, int):
        img_size = (img_size, img_size)
    if isinstance(img_size, (list, tuple)) and len(img_size) == 2:
        rows, columns = (side // patch_size for side in img_size)
        if rows * columns == num_patches:
            return rows, columns
    side = math.isqrt(num_patches)
    if side * side == num_patches:
        return side, side
    return None


def check_shapes(name: str, state: State, own: State, shared: list[str]) -> None:
    """Refuse a checkpoint with a shape that differs, and name the model size that it fits."""
    for key in shared:
        if state[key].shape == own[key].shape:
            continue
        found = f"{key} is {list(state[key].shape)}, the model needs {list(own[key].shape)}"
        hint = ""
        size = size_of(state)
        if size is not None and size != size_of(own):
            hint = f"; it fits --model {size}"
        raise CheckpointError(f"{name} is of another model size: {found}{hint}")


def size_of(state: State) -> str | None:
    """Return the named size whose width is that of the class token, if there is one."""
    if "cls_token" not in state or state["cls_token"].ndim == 0:
        return None
    width = state["cls_token"].shape[-1]
    for name, sizes in MODELS.items():
        if sizes["embed_dim"] == width:
            return name
    return None


def check_depth(name: str, state: State, own: State) -> None:
    """Refuse a checkpoint whose encoder has another number of blocks."""
    found = count_blocks(state)
    needed = count_blocks(own)
    if found != needed:
        message = f"{found} encoder blocks, the model needs {needed}"
        raise CheckpointError(f"{name} is of another model size: {message}")


def count_blocks(state: State) -> int:
    """Count the encoder blocks in a state dict."""
    return len({key.split(".")[1] for key in state if key.startswith("blocks.")})


# ---------------------------------------------------------------------------------------------------------------------
# Layouts of other projects, in

_TRANSFORMERS_NAMES = [  # (pattern of transformers' ViTMAE key, key of facebookresearch/mae); both of its generations
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^vit\.(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"^decoder\.decoder_layers\.(\d+)\.", r"decoder_blocks.\1."),
    (r"^decoder\.", ""),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(?:intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"(?<!attn\.proj)\.(?:output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
]


def reference_keys(content: dict) -> tuple[str, State]:
    """Find the weights in a checkpoint and rename them to facebookresearch/mae's keys -> (layout, state dict)."""
    state = strip_wrappers(find_tensors(content))
    if "embeddings.cls_token" in state:  # transformers' ViTMAEModel alone
        state = {f"vit.{key}": value for key, value in state.items()}
    if "vit.embeddings.cls_token" in state:
        return "transformers ViTMAE", join_qkv(rename_transformers_keys(state))
    if "model_config" in content:
        return "this project", state
    return "facebookresearch/mae or timm keys", state


def find_tensors(content: dict) -> State:
    """Collect the dense, real tensors with a name from a checkpoint or from the state dict inside it."""
    state = content
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            state = content[key]
            break
    kept = content.get("objective")  # of a run's last.pt; what its model.pt will hold is the teacher
    if isinstance(kept, dict) and isinstance(kept.get("teacher"), dict):
        state = kept["teacher"]
    return {key: value for key, value in state.items() if isinstance(key, str) and is_plain_tensor(value)}


def is_plain_tensor(value: object) -> bool:
    """Say whether a value is a tensor that can be a weight: dense, real and on the CPU."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_complex()


def strip_wrappers(state: State) -> State:
    """Remove the prefixes that DistributedDataParallel and torch.compile put in front of keys."""
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def rename_transformers_keys(state: State) -> State:
    """Rename transformers' keys to facebookresearch/mae's; query, key and value become attn.q, attn.k and attn.v."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in _TRANSFORMERS_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def join_qkv(state: State) -> State:
    """Concatenate attn.q, attn.k and attn.v to attn.qkv. Raises CheckpointError if one of the three is missing."""
    joined = dict(state)
    for query in state:
        if ".attn.q." not in query:
            continue
        parts = []
        for letter in "qkv":
            key = query.replace(".attn.q.", f".attn.{letter}.")
            if key not in state:
                raise CheckpointError(f"the checkpoint lacks {key}; download or copy it again")
            parts.append(joined.pop(key))
        joined[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# Layouts of other projects, out

GENERATIONS = (4, 5)  # versions of transformers that name ViT's layers differently

_NAMES_IN_TRANSFORMERS = [  # (pattern of facebookresearch/mae's key, name in transformers 4, name in transformers 5)
    (r"^cls_token$", "vit.embeddings.cls_token", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings", "vit.embeddings.position_embeddings"),
    (
        r"^patch_embed\.proj\.",
        "vit.embeddings.patch_embeddings.projection.",
        "vit.embeddings.patch_embeddings.projection.",
    ),
    (r"^norm\.", "vit.layernorm.", "vit.layernorm."),
    (r"^blocks\.", "vit.encoder.layer.", "vit.layers."),
    (r"^decoder_blocks\.", "decoder.decoder_layers.", "decoder.decoder_layers."),
    (r"^(mask_token$|decoder_)", r"decoder.\1", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after.", ".layernorm_after."),
    (r"\.attn\.q\.", ".attention.attention.query.", ".attention.q_proj."),
    (r"\.attn\.k\.", ".attention.attention.key.", ".attention.k_proj."),
    (r"\.attn\.v\.", ".attention.attention.value.", ".attention.v_proj."),
    (r"\.attn\.proj\.", ".attention.output.dense.", ".attention.o_proj."),
    (r"\.mlp\.fc1\.", ".intermediate.dense.", ".mlp.fc1."),
    (r"\.mlp\.fc2\.", ".output.dense.", ".mlp.fc2."),
]


def encoder_state(state: State) -> State:
    """Keep what belongs to the encoder of a state dict under facebookresearch/mae's keys."""
    return {key: value for key, value in state.items() if key.startswith(ENCODER_KEYS)}


def transformers_keys(state: State, generation: int = 5) -> State:
    """Rename facebookresearch/mae's keys to those of transformers' ViTMAEForPreTraining, what `reference_keys` undoes.

    generation: the version of transformers whose names are used, one of GENERATIONS.
    """
    column = 1 + GENERATIONS.index(generation)
    renamed = {}
    for key, value in split_qkv(state).items():
        for names in _NAMES_IN_TRANSFORMERS:
            key = re.sub(names[0], names[column], key)
        renamed[key] = value
    return renamed


def split_qkv(state: State) -> State:
    """Cut attn.qkv into attn.q, attn.k and attn.v, what `join_qkv` undoes."""
    split = {}
    for key, value in state.items():
        if ".attn.qkv." not in key:
            split[key] = value
            continue
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            split[key.replace(".attn.qkv.", f".attn.{letter}.")] = part.clone()  # a file holds no shared memory
    return split


if __name__ == "__main__":
    # The command line belongs to export.py, which imports this file; copied without it, this file is a library.
    runpy.run_path(str(Path(__file__).with_name("export.py")), run_name="__main__")
