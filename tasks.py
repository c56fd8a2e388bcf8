"""The downstream tasks by name: what finetune.py, baseline.py and evaluate.py accept as --task. Name yours here."""

from classification import Breeds, ClassFolders
from objective import Task
from segmentation import Segmentation

TASKS: dict[str, type[Task]] = {"segment": Segmentation, "breeds": Breeds, "classify": ClassFolders}
