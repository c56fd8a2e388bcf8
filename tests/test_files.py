"""The files that promise to work when copied alone do so, and no file outgrows its limit."""

import ast
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USES = {
    "models": "import torch; m = models.build_mae('mae_tiny', img_size=32); print(m(torch.zeros(1, 3, 32, 32))[0].item()); "
    "import sys; assert not {'torchvision', 'engine'} & set(sys.modules)",
    "data": "from pathlib import Path; print(data.trimap_path('oxford-iiit-pet/images/a.jpg'))",
    "engine": "print(engine.lr_at(0, 10, 2, 1.0), engine.setup('cpu').world_size)",
    "metrics": "print(metrics.t_interval([1.0, 2.0, 3.0]))",
}


@pytest.mark.parametrize("name", USES)
def test_a_file_works_when_it_is_copied_alone(name, tmp_path):
    (tmp_path / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}\n{USES[name]}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_no_file_is_longer_than_500_lines_and_importing_it_does_nothing(path):
    assert len(path.read_text().splitlines()) <= 500
    if path.stem in ("baseline", "bench", "evaluate", "finetune", "prepare", "pretrain", "report"):
        assert '__name__ == "__main__"' in path.read_text()


def code_lines(path: Path) -> int:
    """Lines that hold code: without blank lines, comments and docstrings."""
    tree, documented, coded = ast.parse(path.read_text()), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in (*empty, tokenize.ENCODING):
                coded |= set(range(token.start[0], token.end[0] + 1))
    return len(coded - documented)


def test_the_collection_can_be_read_in_an_evening():
    files = sorted(ROOT.glob("*.py"))
    assert all(len(path.read_text().splitlines()) <= 420 for path in files)
    assert sum(map(code_lines, files)) < 3500
