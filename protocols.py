"""Two protocols of the study as flags of the training scripts: ours, and that of the original code as committed.

    PROTOCOLS["original"]["finetune"]           # {"batch_size": 64, "blr": 1e-3, ...}
    choices(PROTOCOLS["original"]["finetune"])  # without what belongs to the schedule

The original code is github.com/Sam-Oliveira/pretraining_mae at commit aa2fea5 (2024-05-29). The runs behind the paper may
have differed from what is committed. Standard library only.
"""

KINDS = ("pretrain", "finetune", "supervised", "resnet50")  # of runs; supervised: the MAE's network from random weights

# Flags that say how long and how fast a run trains; a demo keeps its own. All other flags are choices of method.
SCHEDULE = ("batch_size", "epochs", "blr", "warmup_epochs", "min_lr", "precision")
GPU_ONLY = ("precision",)  # a CPU has no units for 16 bits

ORIGINAL_PRETRAIN = {
    # The commands of instruction.pdf, and the defaults of its pre-training script.
    "batch_size": 32,
    "epochs": 150,
    "blr": "1e-3",  # a rate of 1.25e-4
    "warmup_epochs": 40,
    "min_lr": 0,
    "weight_decay": 0.05,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,  # off unless asked for, and the commands do not ask
    "precision": "fp16",  # torch.cuda.amp with loss scaling
}

ORIGINAL_SEGMENTATION = {
    # What its MAE fine-tuning script and its Pets class do in both MAE arms.
    "batch_size": 64,
    "epochs": 100,
    "blr": "1e-3",  # a rate of 2.5e-4
    "warmup_epochs": 5,
    "min_lr": "1e-6",
    "weight_decay": 0.05,
    "layer_decay": 0.75,  # over the encoder; the decoder learns at the full rate
    "drop_path": 0,  # its network has none
    "crop_scale": 0.08,  # the default of torchvision's RandomResizedCrop
    "flips": True,  # horizontal and vertical
    "elastic": 50,  # alpha of torchvision's ElasticTransform
    "inputs": "unit",  # pixels in 0 to 1, although pre-training normalised them
    "train_positions": False,  # position embeddings need no gradient
    "output": "reshape",  # [B, 196, 768] is read as [B, 3, 224, 224]
    "trimap_resize": "bilinear",
    "keep": "last",  # the test script reads the last checkpoint
    "pets_listing": "every_jpg",
    "pets_division": "leaking",  # random.shuffle for each part, without a seed of its own
    "precision": "fp16",
}

ORIGINAL_SUPERVISED = {
    **ORIGINAL_SEGMENTATION,  # the same script without a checkpoint, so layer_decay is 0.75 here as well
    # The script's default is 512. Which batch the paper's arm had is unknown; 64 is that of the fine-tunings.
    "batch_size": 64,
}

ORIGINAL_RESNET = {
    # adl_supervised_learning: its training script and its own Pets class.
    "optimizer": "adam",
    "batch_size": 32,
    "epochs": 100,
    "blr": "8e-3",  # 1e-3 * 256 / 32: a rate of 1e-3
    "lr_schedule": "constant",
    "warmup_epochs": 0,
    "min_lr": 0,
    "weight_decay": 0,
    "crop_scale": 1,  # no augmentation
    "flips": False,
    "elastic": 0,
    "inputs": "unit",
    "trimap_resize": "nearest",
    "keep": "last",
    "pets_listing": "every_jpg",
    "pets_division": "disjoint",  # this script seeds random as well
}

PROTOCOLS: dict[str, dict[str, dict[str, object]]] = {
    # The defaults of the scripts; README.md lists and explains them.
    "ours": {kind: {} for kind in KINDS},
    "original": {
        "pretrain": ORIGINAL_PRETRAIN,
        "finetune": ORIGINAL_SEGMENTATION,
        "supervised": ORIGINAL_SUPERVISED,
        "resnet50": ORIGINAL_RESNET,
    },
}


def choices(flags: dict[str, object]) -> dict[str, object]:
    """Select the flags that are choices of method."""
    return {name: value for name, value in flags.items() if name not in SCHEDULE}


def protocol_flags(protocol: str, kind: str, demo: bool, gpus: bool) -> dict[str, object]:
    """Give the flags of a protocol for a kind of run, one of KINDS. demo: without the schedule; gpus: it has GPUs."""
    flags = PROTOCOLS[protocol][kind]
    if demo:
        return choices(flags)
    if gpus:
        return dict(flags)
    return {name: value for name, value in flags.items() if name not in GPU_ONLY}
