"""The files that promise to work when copied do so, and importing a script does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USES = {
    "models": "import torch; m = models.build_mae('mae_tiny', img_size=32); print(m(torch.zeros(1, 3, 32, 32))[0].item()); "
    "import sys; assert not {'torchvision', 'engine'} & set(sys.modules)",
    "data": "from pathlib import Path; print(data.trimap_path('oxford-iiit-pet/images/a.jpg'))",
    "engine": "print(engine.lr_at(0, 10, 2, 1.0), engine.setup('cpu').world_size)",
    "runs": "import engine; print(runs.RunFolder('run', engine.setup('cpu'), {'experiment': {}}).load())",
    "metrics": "print(metrics.t_interval([1.0, 2.0, 3.0]))",
}
NEEDS = {"runs": ["engine"]}


@pytest.mark.parametrize("name", USES)
def test_a_file_works_when_it_is_copied_with_the_files_it_names(name, tmp_path):
    for file in (name, *NEEDS.get(name, ())):
        (tmp_path / f"{file}.py").write_bytes((ROOT / f"{file}.py").read_bytes())
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}\n{USES[name]}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_importing_a_script_does_nothing(path):
    if path.stem in ("baseline", "bench", "evaluate", "finetune", "prepare", "pretrain", "report"):
        assert '__name__ == "__main__"' in path.read_text()
