"""report.html is one valid file with the content of report.md; texts of any origin stand in both as they are."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from study_folder import write_study

import figures
from blocks import Heading, Listing, Note, Paragraph, Picture, Table, literal, plain_text, write_markdown
from groups import Study
from html_page import html_text, write_html
from report import get_args_parser, main
from results import best_trivial
from tables import Column, Page

ROOT = Path(__file__).resolve().parent.parent
NASTY = "a<b>&amp; **x** `y` _z_ \\ | [l](http://e.x) ![i](j.png) <script>alert(1)</script>"
VOID = {"meta", "img", "br", "hr", "link"}


class Reader(HTMLParser):
    """Collects elements, with the classes of those around them, and the text of cells; checks that tags match."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.elements = []  # (tag, attributes, tags and classes around it)
        self.rows = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes, list(self.open)))
        if tag not in VOID:
            self.open.append((tag, attributes.get("class", "")))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "td" in tags or "th" in tags:
            self.rows[-1][-1] += data
        if "style" not in tags:
            self.text += data

    def all(self, tag):
        return [(attributes, around) for name, attributes, around in self.elements if name == tag]


def markdown_rows(text):
    """The cells of all tables of a Markdown page."""
    rows = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            cells = re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
            rows.append([re.sub(r"\\(.)", r"\1", cell) for cell in cells])
    return rows


def run_report(study, *flags):
    return subprocess.run([sys.executable, ROOT / "report.py", study, *flags], capture_output=True, text=True)


def draw_nothing(path, *_, **__):
    Image.new("RGB", (1, 1)).save(path)


def quick_report(study, *flags):
    """Make the report without drawing."""
    names = ("forest", "curve_panels", "image_grid", "bands", "scatter")
    with mock.patch.multiple(figures, **dict.fromkeys(names, draw_nothing)):
        main(get_args_parser().parse_args([str(study), *flags]))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("html") / "study", n=40, epochs=3)


@pytest.fixture(scope="module")
def done(study):
    return run_report(study)


@pytest.fixture(scope="module")
def pages(study, done):
    assert done.returncode == 0, done.stderr
    folder = study / "report"
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_the_html_page_is_one_file_with_semantic_elements(pages):
    _, text = pages
    page = Reader(text)
    assert len(page.all("h1")) == len(page.all("title")) == len(page.all("main")) == 1 and len(page.all("h2")) >= 6
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert not re.search(r"https?:|url\(|@import", text)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes, _ in page.all("a")]
    assert len(links) == len(page.all("h2")) and all(link.removeprefix("#") in ids for link in links)
    for word in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto"):
        assert word in text
    assert page.all("meta")[1][0]["content"] == "width=device-width, initial-scale=1"


def test_every_picture_is_inside_and_described_by_its_caption(pages):
    markdown, text = pages
    page = Reader(text)
    pictures = page.all("img")
    assert (
        len(pictures) == len(page.all("figcaption")) == len(re.findall(r"!\[Figure \d+\]\(\w+\.png\)", markdown)) >= 5
    )
    for number, (attributes, around) in enumerate(pictures, 1):
        assert attributes["src"].startswith("data:image/png;base64,iVBOR")
        assert attributes["alt"].startswith(f"Figure {number}. ") and len(attributes["alt"]) > 30
        assert ("figure", "") in around


def test_only_the_tables_scroll_sideways(pages):
    page = Reader(pages[1])
    tables = page.all("table")
    assert len(tables) >= 8
    for _, around in tables:
        assert around[-1] == ("div", "scroll")
    for attributes, around in page.all("th"):
        assert attributes["scope"] == ("col" if ("thead", "") in around else "row")


def test_both_pages_have_the_same_tables_and_texts(pages):
    markdown, text = pages
    page = Reader(text)
    rows = markdown_rows(markdown)
    assert len(rows) > 60 and page.rows == rows
    for sentence in ("The best predictor that looks at no image", "test IoU runs from", "Figure 1. Test images with"):
        assert sentence in page.text and sentence in markdown
    assert "**" not in page.text and "`" not in page.text


def test_the_page_opens_with_the_masks(pages):
    markdown, text = pages
    assert markdown.index("(masks.png)") < markdown.index("## ") and "![Figure 1](masks.png)" in markdown
    assert text.index("<img") < text.index("<nav") < text.index("<h2")


def test_without_masks_it_opens_with_reconstructions(tmp_path):
    study = write_study(tmp_path / "study", task="breeds", n=40, epochs=3, seeds=(0,))
    quick_report(study)
    text = (study / "report/report.md").read_text()
    assert "![Figure 1](reconstruction.png)" in text.split("\n## ")[0] and text.count("(reconstruction.png)") == 1


def test_the_terminal_shows_the_main_numbers_in_five_lines(study, done, capsys):
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    rows = {row["arm"]: row["iou"] for row in json.loads((study / "report/table2.json").read_text())}
    for label in ("Finetuned-Animals", "Finetuned-Non-Animals", "Finetuned-Mixed", "Supervised MAE", "ResNet-50"):
        assert f"{label} {rows[label]:.3f}" in lines[0]
    trivial = best_trivial(Study(study))
    assert lines[1].endswith(f"{trivial.iou:.3f}") and trivial.name in lines[1]
    assert f"animals {100 * (rows['Finetuned-Animals'] - rows['Supervised MAE']):+.1f} [" in lines[2]
    assert "report.md" in lines[3] and "report.html" in lines[4]
    quick_report(study, "--quiet")
    assert capsys.readouterr().out == f"{study / 'report/report.html'}\n"


def test_one_seed_is_shown_with_the_bootstrap_interval(tmp_path, capsys):
    study = write_study(tmp_path / "study", n=40, epochs=3, seeds=(0,))
    quick_report(study)
    [row] = [
        r
        for r in json.loads((study / "report/image_bootstrap.json").read_text())
        if r["label"].endswith("− Supervised MAE")
    ][:1]
    interval = f"animals {row['difference']:+.1f} [{row['difference_low']:+.1f}, {row['difference_high']:+.1f}]"
    assert interval in capsys.readouterr().out


@pytest.mark.parametrize("behind", [("Finetuned-Half",), ("Finetuned-Half", "ResNet-50"), "all"])
def test_arms_that_beat_no_trivial_predictor_are_named_and_marked(tmp_path, behind):
    study = write_study(tmp_path / "study", n=40, epochs=3)
    folders = {"Finetuned-Half": "finetune_half", "ResNet-50": "baseline_resnet50"}
    arrays = dict(np.load(study / "reference.npz"))
    best = "all background"
    if behind == "all":
        best = "mean training mask"
        arrays["counts_mean_mask"] = np.broadcast_to(np.eye(3, dtype=np.int64) * 100, (40, 3, 3))
    else:
        for label in behind:
            path = study / "seed1" / folders[label] / "test.npz"  # one seed is enough
            np.savez(path, **{**np.load(path), "counts": arrays["counts_all_background"]})
    np.savez(study / "reference.npz", **arrays)
    quick_report(study)
    text = (study / "report/report.md").read_text()
    marked = re.findall(r"^\| (\S.*?) † \|", text, re.MULTILINE)
    rows = json.loads((study / "report/table2.json").read_text())
    assert sorted(marked) == sorted(row["arm"] for row in rows if row.get("beats_trivial") is False)
    assert f"† Does not beat the best predictor that looks at no image ({best}, " in text
    if behind == "all":
        assert "no arm beats it." in text and len(marked) == 6
    else:
        assert set(marked) == set(behind)
        assert ("Finetuned-Half does not beat it." in text) == (len(behind) == 1)
        assert ("do not beat it." in text) == (len(behind) == 2)


def test_texts_of_any_origin_are_shown_as_they_are(study, tmp_path):
    quick_report(study, "--title", NASTY, "--output", str(tmp_path / "a<i>&'\" b"))
    [folder] = tmp_path.iterdir()
    text = (folder / "report.html").read_text()
    page = Reader(text)
    assert NASTY in page.text and not page.all("script") and not page.all("i")
    first = (folder / "report.md").read_text().splitlines()[0]
    assert "\\<script>" in first and not re.search(r"(?<!\\)\]\(", first) and not re.search(r"(?<!\\)[*`<]", first)


def test_the_blocks_are_escaped_in_both_pages(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "dot.png")
    blocks = [Heading(literal(NASTY), 1), Heading("Same", 2), Heading("Same", 2), Note(literal(NASTY))]
    blocks += [Listing((literal(NASTY), "two")), Table(["head|", "n"], [[NASTY, "1"]], [False, True])]
    blocks += [Picture("dot", 1, literal(NASTY)), Paragraph(f"**strong {literal(NASTY)}** and `a*b<c>`")]
    page = Reader(write_html(blocks, tmp_path))
    assert page.text.count(NASTY) == 6 + 1  # the title twice
    assert page.rows == [["head|", "n"], [NASTY, "1"]] and not page.all("script")
    assert page.all("img")[0][0]["alt"] == f"Figure 1. {NASTY}"
    assert [a["id"] for a, _ in page.all("h2")] == ["same", "same-2"]
    markdown = write_markdown(blocks)
    assert markdown_rows(markdown) == page.rows
    assert "`a*b<c>`" in markdown and not re.search(r"(?<!\\)(<script|\]\(http)", markdown)


def test_inline_marks_come_out_right():
    assert html_text("**a `b` c** d `e<f` \\*g\\* h*i") == (
        "<strong>a <code>b</code> c</strong> d <code>e&lt;f</code> *g* h*i"
    )
    assert plain_text("**a `b`** c \\`") == "a b c `"
    assert write_markdown([Paragraph("**a** `b` snake_case _c_ 1 < 2")]) == "**a** `b` snake_case \\_c\\_ 1 \\< 2\n"


def test_pages_take_texts_tables_and_figures(tmp_path):
    page = Page(tmp_path)
    page.add("## Title\n\nText.", "", "More.")
    page.table("t", [{"a": "x", "b": 0.5}], [Column("a"), Column("b", "B", 1)])
    page.figure("f", "A picture.", draw_nothing)
    page.write("page")
    text = "## Title\n\nText.\n\nMore.\n\n| a | B |\n| --- | ---: |\n| x | 0.5 |\n\n"
    text += "![Figure 1](f.png)\n\n*Figure 1. A picture.*\n"
    assert (tmp_path / "page.md").read_text() == text
    assert (tmp_path / "t.csv").read_text().split() == ["a,b", "x,0.5"] and (tmp_path / "page.html").stat().st_size


def test_an_output_that_is_no_folder_is_refused(study, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for output in (file, file / "below"):
        done = run_report(study, "--output", output)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: {output} is no folder") and "--output" in done.stderr
    assert file.read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_an_output_that_cannot_be_written_ends_in_one_line(study):
    done = run_report(study, "--output", "/proc/self/report")
    assert done.returncode == 1 and done.stderr.startswith("error: the report cannot be written: ")
    assert done.stderr.count("\n") == 1 and "--output" in done.stderr


def test_masks_are_drawn_over_faint_photos():
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    truth = np.ones((2, 64, 64), np.uint8)
    truth[:, 16:48, 16:48] = 0
    masks = np.ones_like(truth)
    masks[:, :, :32] = 0
    drawn = figures.overlays(photos, masks, truth)
    assert drawn.shape == (2, 384, 384, 3) and drawn.dtype == np.uint8
    background = drawn[:, :, 300:]
    assert np.ptp(background, axis=-1).max() == 0 and background.min() >= 0.45 * 255 - 1  # grey and faint
    assert (drawn[:, :90, :180, 0] > drawn[:, :90, :180, 2] + 50).all()  # tinted
    black = (drawn == 0).all(-1)
    assert black[:, 96:99, 96:288].all() and black[:, 96:288, 285:288].all()
    assert not black[:, :96].any() and not black[:, 99:285, 99:285].any()
    assert figures.enlarge(np.zeros((1, 224, 224), np.uint8)).shape == (1, 448, 448)
