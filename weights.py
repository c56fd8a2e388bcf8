"""Reading checkpoints safely, and loading weights that other projects published into the models of models.py.

print(load_pretrained(build_segmenter("mae_base"), "mae_pretrain_vit_base.pth"))     # what was loaded, what is new
model, checkpoint = load_model("runs/study/seed0/finetune_animal/model.pt")
"""

import os
import pickle
import re
from dataclasses import dataclass

import torch
from torch import nn

from models import MODELS, build_mae, build_segmenter, interpolate_pos_embed


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""

    exit_code = 2


@dataclass
class LoadReport:
    """What `load_pretrained` did, by state-dict key; new_head starts fresh on purpose."""

    source: str
    layout: str
    loaded: list[str]
    new_head: list[str]
    missing: list[str]
    unexpected: list[str]
    interpolated: list[str]  # position embeddings fitted to another grid

    def __str__(self) -> str:
        parts = []
        for name in ("loaded", "new_head", "missing", "unexpected"):
            keys = getattr(self, name)
            modules = ", ".join(sorted({k.split(".")[0] for k in keys}))
            parts.append(f"{name.replace('_', ' ')} {f'{len(keys)} ({modules})' if keys else 'none'}")
        parts += [f"positions interpolated: {', '.join(self.interpolated)}"] if self.interpolated else []
        parts += ["the decoder starts fresh"] if any(k.startswith("decoder_blocks") for k in self.missing) else []
        return f"{self.source} ({self.layout}): " + "; ".join(parts)


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint file to CPU memory without running any code in it; CheckpointError if that cannot be done."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except pickle.UnpicklingError:
        found = f"{path} is not a checkpoint of tensors and plain values only"
        raise CheckpointError(f"{found}; loading it could run code, so it is refused") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be opened: {error.strerror}") from None
    except Exception:  # torch reports damaged archives with many types, and advises to load them unsafely
        raise CheckpointError(f"{path} is damaged or no checkpoint; download or copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def load_pretrained(model: nn.Module, source: str | os.PathLike | dict) -> LoadReport:
    """Load what fits of a pre-trained MAE into a model of models.py, and report it.

    source: a path or a loaded dictionary: checkpoints of this project, facebookresearch/mae's full or encoder-only files,
    timm's ViT or transformers' ViTMAE state dicts. Position embeddings are interpolated to the model's grid. The last
    layer of a `MAESegmenter` is never taken from a checkpoint: its key and shape equal the pixel predictor's.
    Raises CheckpointError if nothing is in common or a shape differs.
    """
    named = isinstance(source, (str, os.PathLike))
    name, content = (str(source), read_checkpoint(source)) if named else ("state dict", source)
    layout, state = reference_keys(content)
    own, config = model.state_dict(), content.get("model_config", {})
    # A segmenter's class head is no pixel predictor.
    swapped = config.get("kind") == "segmenter" and hasattr(model, "norm_pix_loss")
    new_head = [k for k in own if k.startswith(getattr(model, "fresh_keys", ("decoder_pred.",) if swapped else ()))]
    shared = [k for k in own if k in state and k not in new_head]
    if not any(k.startswith(("blocks.", "backbone.")) for k in shared):
        keys = ", ".join(list(state)[:3]) or "none"
        raise CheckpointError(f"{name} has no layer in common with the model (its keys: {keys} ...)")
    interpolated, pixels = [], config.get("img_size")  # without it, the positions of a square image are supposed
    grid = [side // model.patch_size for side in ([pixels] * 2 if isinstance(pixels, int) else pixels or ())]
    for key in shared:
        table = key in ("pos_embed", "decoder_pos_embed") and state[key].ndim == 3
        if table and state[key].shape[2] == own[key].shape[2]:
            rows = state[key].shape[1] - 1
            source_grid = tuple(grid) if grid and grid[0] * grid[1] == rows else (int(rows**0.5),) * 2
            if source_grid != model.grid and source_grid[0] * source_grid[1] == rows:
                state[key] = interpolate_pos_embed(state[key], source_grid, model.grid)
                interpolated.append(key)
        if state[key].shape != own[key].shape:
            found = f"{key} is {list(state[key].shape)}, the model needs {list(own[key].shape)}"
            dim = state["cls_token"].shape[-1:] if "cls_token" in state else ()
            same = "cls_token" in own and dim == own["cls_token"].shape[-1:]
            sizes = [] if same else [size for size in MODELS if (MODELS[size]["embed_dim"],) == dim]
            hints = [f"; it fits --model {size}" for size in sizes]
            raise CheckpointError(f"{name} is of another model size: {found}{''.join(hints[:1])}")
    depths = [len({k.split(".")[1] for k in keys if k.startswith("blocks.")}) for keys in (state, own)]
    if depths[0] != depths[1]:
        found = f"{depths[0]} encoder blocks, the model needs {depths[1]}"
        raise CheckpointError(f"{name} is of another model size: {found}")
    model.load_state_dict({k: state[k] for k in shared}, strict=False)
    missing = [k for k in own if k not in state and k not in new_head]
    return LoadReport(name, layout, shared, new_head, missing, [k for k in state if k not in own], interpolated)


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


def reference_keys(content: dict) -> tuple[str, dict[str, torch.Tensor]]:
    """Find the weights in a checkpoint and rename them to facebookresearch/mae's keys -> (layout, state dict)."""
    state = next((content[k] for k in ("model", "state_dict") if isinstance(content.get(k), dict)), content)
    layout = "this project" if "model_config" in content else "facebookresearch/mae or timm keys"
    plain = [(k, v) for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)]
    dense = {k: v for k, v in plain if v.layout == torch.strided and v.device.type == "cpu" and not v.is_complex()}
    state = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", k): v for k, v in dense.items()}
    if "embeddings.cls_token" in state:  # transformers' ViTMAEModel alone
        state = {f"vit.{k}": v for k, v in state.items()}
    if "vit.embeddings.cls_token" not in state:
        return layout, state
    renamed = {}
    for key, value in state.items():
        for pattern, name in _TRANSFORMERS_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [k for k in renamed if ".attn.q." in k]:
        names = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if lost := [name for name in names if name not in renamed]:
            raise CheckpointError(f"the checkpoint lacks {lost[0]}; download or copy it again")
        parts = [renamed.pop(name) for name in names]
        renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return "transformers ViTMAE", renamed


def load_model(path: str) -> tuple[nn.Module, dict]:
    """Rebuild a model from a checkpoint that this project's scripts wrote -> (model in eval mode, the whole checkpoint)."""
    content = read_checkpoint(path)
    config = content.get("model_config")
    if not isinstance(config, dict) or "model" not in content:
        raise CheckpointError(f"{path} was not written by this project's training scripts (it has no model_config)")
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k not in ("kind", "name")}
    try:
        model = (build_mae if config["kind"] == "mae" else build_segmenter)(config["name"], **sizes)
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the model it names: {str(error).splitlines()[0]}") from None
    return model.eval(), content
