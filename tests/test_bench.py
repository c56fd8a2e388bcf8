"""The benchmark runs at tiny sizes, writes one JSON line per measurement, and reports only what was measured.

No test looks at how long anything took.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import bench
import bench_choices
import bench_eager
import bench_growth
import bench_peers
import bench_products
import bench_rest
import bench_timing
import models
from data import read_image
from engine import EngineError, setup
from folders import read_tree
from trainer import Trainer

ROOT = Path(bench.__file__).parent
TINY = ["--quick", "--model", "mae_tiny", "--img_size", "32", "--batch_size", "2", "--repeats", "1", "--device", "cpu"]


def run(folder, *flags):
    command = [sys.executable, str(ROOT / "bench.py"), *map(str, flags)]
    env = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes a minute, and is torch's to test
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = run(
        folder,
        *TINY,
        "--profile",
        "traces",
        "--tasks",
        *bench.TRAININGS,
        "data",
        "rest",
        "growth",
        "study",
        "products",
        "choices",
        "objectives",
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]
    return folder, rows, done.stdout


def test_quick_measures_every_training_on_both_kinds_of_batches(quick):
    _, rows, _ = quick
    measured = {(r["task"], r["variant"]) for r in rows}
    for task in ("pretrain", "finetune", "resnet50"):
        assert {(task, bench.SYNTHETIC), (task, bench.REAL), (f"{task} validation", bench.SYNTHETIC)} <= measured
    for row in rows:
        assert row["machine"]["versions"]["torch"]
        assert "bench.py" in row["machine"]["command"]
        if "step_ms" in row:
            assert row["img_s"] == pytest.approx(1e3 * row["batch_size"] / row["step_ms"])
            assert row["mfu"] is None  # no peak is known for a CPU
            if row["task"] in (*bench.TRAININGS, "objectives"):
                assert row["mem_gb"] > 0


def test_memory_is_the_most_that_a_step_holds_at_a_time():
    kept = torch.zeros(1000)

    def step():
        first = kept + 1
        second = torch.cat([first, first])
        del first
        return second + 1

    assert bench_timing.most_allocated(step) == pytest.approx(4 * 4000, abs=100)
    assert bench_timing.most_allocated(step) == pytest.approx(4 * 4000, abs=100)


def test_every_choice_in_the_step_is_measured_beside_its_alternative(quick):
    names = [r["variant"] for r in quick[1] if r["task"] == "choices"]
    assert names == [bench.SYNTHETIC, *bench_choices.PATCHES, *bench_choices.OPTIMIZERS]
    for name in ("compilation", "cuda_graph", *bench_choices.KERNELS, "max-autotune"):  # the compiler is switched off
        assert f"{name} is left out: " in quick[2]


def test_what_a_study_spends_besides_steps_is_measured(quick):
    rows = {(r["task"], r["variant"]): r for r in quick[1]}
    assert rows["decoding", "rest"]["img_s"] > 0
    assert rows["testing", "rest"]["img_s"] > 0
    assert rows["checkpoint", "rest"]["seconds"] > 0
    assert {("starting", "first time"), ("starting", "again")} <= rows.keys()
    assert "adds" in rows["pretrain validation", "share"]["note"]
    assert rows["products", "its matrix products alone"]["note"].endswith("of the step")


def test_a_training_has_started_when_its_first_step_is_done(tmp_path):
    log = tmp_path / "log.jsonl"
    assert not bench_rest.has_step(log)
    configuration = json.dumps({"event": "config", "manifest": {"train": []}})
    step = json.dumps({"event": "train", "step": 1})
    for content, started in (("", False), (configuration + "\n", False), (configuration + "\n" + step, False)):
        log.write_text(content)
        assert bench_rest.has_step(log) == started
    log.write_text(f"{configuration}\n{step}\n")
    assert bench_rest.has_step(log)


def test_what_more_images_cost_is_measured(quick):
    rows = [r for r in quick[1] if r["task"] == "growth"]
    assert [r["images"] for r in rows] == list(bench_growth.QUICK_COUNTS)
    for row in rows:
        assert row["seconds"].keys() == {"listing", "decoding", "opening"}
        assert row["cpu_ms"] > 0
    (opening,) = [r for r in quick[1] if r["task"] == "opening"]
    first, last = (row["seconds"]["opening"] for row in rows)
    more = rows[-1]["images"] - rows[0]["images"]
    assert opening["note"] == f"{1e6 * (last - first) / more:,.0f} us for each image more"


def test_photos_of_a_growing_folder_are_all_different_and_can_be_read(tmp_path):
    colours = ["red", "green", "blue"]
    photos = []
    for colour in colours:
        Image.new("RGB", (2000, 1000), colour).save(tmp_path / f"{colour}.png")
        photos.append(bench_growth.small_photo(tmp_path / f"{colour}.png"))
    bench_growth.write_photos(photos, tmp_path / "many", 7)
    images = read_tree(tmp_path / "many")
    assert len(images.train.images) + len(images.held_out.images) == 7
    assert images.remarks == ()
    for image in images.train.images:
        assert read_image(tmp_path / "many" / image).size == (640, 320)


@pytest.mark.parametrize("name", bench_choices.PATCHES)
def test_an_alternative_computes_the_same_loss_and_gradients(name):
    torch.manual_seed(0)
    model = models.build_mae("mae_tiny", img_size=64)
    images, noise, found = torch.randn(3, 3, 64, 64), torch.rand(3, 16), []

    def step():
        model.zero_grad()
        loss = model(images, 0.75, noise, loss_only=True)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])

    step()
    bench_choices.undone(name, step)()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_attention_kernel_can_be_prescribed_where_the_device_has_it():
    q = torch.randn(2, 2, 5, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    alone = bench_choices.with_kernel("attention by FlashAttention", attend)  # CPUs have one of that name
    torch.testing.assert_close(alone(q, q, q), bench_choices.explicit_attention(q, q, q))
    for name in bench_choices.KERNELS:
        assert not bench_choices.has_kernel(name, torch.device("cpu"), torch.float32)


def test_contestants_apart_find_nothing_that_was_compiled_before(tmp_path, monkeypatch):
    args = bench.get_args_parser().parse_args([*TINY, "--no-compile", "--output", str(tmp_path / "bench.jsonl")])
    args.peers = ()
    apart = bench.Bench(args, setup("cpu"), str(tmp_path))
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    found = []

    def step():
        found.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    contestants = {name: bench_timing.Contestant(step) for name in ("one", "other")}
    apart.compare("choices", contestants, 1, apart=True)
    assert len(resets) == 2
    assert found[0] == found[1] != found[2] == found[3]
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["one", "other"]


def test_what_a_kill_left_half_written_is_cut_off_and_other_lines_are_refused(tmp_path):
    args = bench.get_args_parser().parse_args([*TINY, "--output", str(tmp_path / "bench.jsonl")])
    args.peers = ()
    path = tmp_path / "bench.jsonl"
    ledger = bench.Bench(args, setup("cpu"), str(tmp_path)).ledger
    ledger.record("data", "one")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    ledger.mend()
    assert path.read_bytes() == whole
    ledger.mend()
    assert path.read_bytes() == whole
    path.write_bytes(b"other\n")
    done = run(tmp_path, *TINY, "--tasks", "products")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("bench.jsonl holds lines that bench.py did not write: line 1 is no JSON")
    assert path.read_bytes() == b"other\n"


def test_an_objective_for_which_the_memory_is_too_small_is_left_out(capsys):
    with bench.room_needed("dino", 256):
        raise torch.OutOfMemoryError
    assert capsys.readouterr().out.startswith("dino is left out: the memory is too small for 256 images")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--synthetic", "--tasks", "growth", "rest"], "--tasks growth rest measures on photos"),
        (["--tasks", "products", "--choices", "compilation"], "--choices belongs to --tasks choices"),
    ],
)
def test_flags_that_would_measure_nothing_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match=message):
        bench.main(bench.get_args_parser().parse_args([*TINY, *flags]))
    assert list(tmp_path.iterdir()) == []


def test_autotuning_is_asked_of_the_compiler_and_trains_the_same_parameters(workshop, monkeypatch):
    asked = []

    def compile(network, **options):
        asked.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(workshop.args, "compile", True)
    training = workshop.training(workshop.objective("pretrain", 2))
    other = bench.autotuned(workshop, training)
    assert asked == [{"dynamic": False}, {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}]
    assert other.trainer.optimizer is training.trainer.optimizer
    assert other.objective.model is training.objective.model
    assert torch.compile is compile
    plain = bench.set_up_again(workshop, training, compile=False)
    assert len(asked) == 2
    assert plain.trainer.network is plain.trainer.model is training.trainer.model
    assert plain.trainer.optimizer is training.trainer.optimizer
    assert training.objective.args.compile


def test_every_objective_is_measured_with_its_cost_relative_to_the_first(quick):
    rows = [r for r in quick[1] if r["task"] == "objectives"]
    too_large = {"ijepa"}  # an image of four patches has no room for its blocks
    assert [r["variant"] for r in rows] == [name for name in bench.pretrain.OBJECTIVES if name not in too_large]
    assert "ijepa is left out: --context_ratio 0.25 asks for 1 of 4 patches" in quick[2]
    assert rows[0]["ratio"] == 1
    assert "GFLOP per image, 1.00 x the first; " in rows[0]["note"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    flags = [*TINY, "--no-compile"]
    args = bench.get_args_parser().parse_args(flags)
    return bench.Workshop(args, setup("cpu"), str(tmp_path_factory.mktemp("workshop")))


@pytest.mark.parametrize("task", bench.TRAININGS)
def test_what_is_timed_is_the_step_of_the_training_loop(task, workshop, monkeypatch):
    training = workshop.training(workshop.objective(task, 2))
    steps = []
    real_step = Trainer.train_step

    def spy(trainer, micro_batches, want_norm):
        steps.append((trainer.objective.name, len(micro_batches[0]["images"]), want_norm))
        return real_step(trainer, micro_batches, want_norm)

    monkeypatch.setattr(Trainer, "train_step", spy)
    before = [p.detach().clone() for p in training.trainer.params]
    training.contestant(iter([bench.random_pixels(training.batches)])).step()
    training.on_real_batches().step()
    name = "mae" if task == "pretrain" else "segment"
    assert steps == [(name, 2, False), (name, 2, False)]
    assert any((p != old).any() for p, old in zip(training.trainer.params, before, strict=True))
    assert not (Path(training.trainer.run.dir) / "log.jsonl").exists()


def test_turns_come_in_changing_order():
    names = ["a", "b", "c"]
    orders = ["".join(bench_timing.order_of_turn(names, turn)) for turn in range(6)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_a_missing_peer_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(bench_peers, "PACKAGES", ("no-such-package",))
    with pytest.raises(EngineError, match="no-such-package, which is not installed; `pip install"):
        bench.describe_machine(torch.device("cpu"), peers=["eager", "no-such-package"])
    assert "no-such-package" not in bench.describe_machine(torch.device("cpu"), peers=["eager"])["versions"]


def test_another_optimizer_makes_the_same_update():
    torch.manual_seed(0)
    start = torch.randn(5, 5)
    updated = []
    for name in (None, *bench_choices.OPTIMIZERS):
        weight = torch.nn.Parameter(start.clone())
        groups = [{"params": [weight], "lr_scale": 1.0, "weight_decay": 0.05}]
        optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=True)
        if name is not None:
            optimizer = bench_choices.other_optimizer(name, optimizer)
        weight.square().sum().backward()
        optimizer.step()
        updated.append(weight.detach())
    for other in updated[1:]:
        torch.testing.assert_close(other, updated[0])


def test_quick_profiles_and_prints_a_table(quick):
    folder, rows, output = quick
    assert {p.name for p in (folder / "traces").iterdir()} == {
        "pretrain.json.gz",
        "finetune.json.gz",
        "resnet50.json.gz",
    }
    assert "Self CPU" in output
    assert output.count("| pretrain | ") == 3
    assert any(r["variant"] == "profile" and "of a step" in r["note"] for r in rows)


def test_the_study_is_projected_from_the_rates_of_the_same_run(quick):
    _, rows, _ = quick
    rates = bench.study_rates(rows)
    (study,) = [r for r in rows if r["task"] == "study"]
    seconds = sum(number / rates[part] for part, number in bench.STUDY.items())
    seconds += seconds / bench.CHECKPOINT_EVERY / rates["checkpoint"]
    assert study["hours"] == pytest.approx(seconds / 3600)
    starts = [r["img_s"] for r in rows if r["task"] == "starting"]
    assert rates["starting"] == min(starts)


def test_a_rate_of_training_counts_in_the_study_only_if_batches_were_real():
    rows = [
        {"task": "pretrain", "variant": bench.SYNTHETIC, "img_s": 9.0},
        {"task": "pretrain", "variant": bench.REAL, "img_s": 7.0},
        {"task": "pretrain validation", "variant": bench.SYNTHETIC, "img_s": 20.0},
        {"task": "checkpoint", "variant": "rest", "seconds": 0.5},
        {"task": "data", "variant": "anything", "img_s": 1.0},
    ]
    assert bench.study_rates(rows) == {"pretrain": 7.0, "pretrain validation": 20.0, "checkpoint": 2.0}


def test_the_products_of_a_step_are_those_that_its_operations_count(workshop):
    training = workshop.training(workshop.pretraining("mae", 2))
    micro_batches = bench.random_pixels(training.batches)
    counts = bench.recorded_products(training, micro_batches)
    with FlopCounterMode(display=False) as counter:
        training.objective.loss(training.objective.model, micro_batches[0]).backward()
    found = counter.get_flop_counts()["Global"]
    expected = sum(flops for operator, flops in found.items() if "attention" not in str(operator))
    alone = bench_products.ProductsAlone(counts, torch.device("cpu"))
    assert alone.flops == expected
    alone()


def test_the_eager_step_of_public_code_computes_the_same_loss_from_the_same_weights():
    torch.manual_seed(0)
    model = models.build_mae("mae_tiny", img_size=64)
    batch = {"images": torch.randn(3, 3, 64, 64), "noise": torch.rand(3, 16)}
    step = bench_eager.eager_step(model, batch, mask_ratio=0.75)
    ours = model(batch["images"], 0.75, batch["noise"], loss_only=True)
    theirs = step.network(batch["images"], 0.75, batch["noise"])
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in step.params]
    step()
    assert any((p != old).any() for p, old in zip(step.params, before, strict=True))


def test_the_study_without_rates_is_unmeasured_and_never_estimated(tmp_path):
    done = run(tmp_path, *TINY, "--synthetic", "--tasks", "study")
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert row["hours"] is None
    assert "not measured: decoding, finetune, finetune validation, opening, pretrain" in row["note"]


def test_peers_are_measured_beside_this_project_and_imported_only_when_asked(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("timm", reason="timm is not installed")
    done = run(tmp_path, *TINY, "--synthetic", "--peers", "--tasks", "pretrain", "finetune")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    names = {r["variant"] for r in rows}
    assert {"transformers ViTMAE (SDPA), synthetic", bench.EAGER, "timm ViT, linear head, synthetic"} <= names
    assert rows[0]["machine"]["versions"]["transformers"]
    code = "import bench, sys; print({'timm', 'transformers'} & set(sys.modules))"
    plain = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert plain.stdout.strip() == "set()", plain.stderr


def test_the_report_lists_measured_lines_and_names_what_no_gpu_has_measured(tmp_path):
    machine = {
        "device": "Some CPU, 2 cores",
        "cores": 2,
        "threads": 2,
        "versions": {"torch": "9"},
        "command": "python bench.py",
    }
    row = {
        "task": "pretrain",
        "variant": bench.REAL,
        "step_ms": 1234.5,
        "img_s": 12.96,
        "mfu": None,
        "machine": machine,
    }
    source, target = tmp_path / "lines.jsonl", tmp_path / "BENCHMARKS.md"
    source.write_text(json.dumps(row) + "\n")
    bench.write_report(str(source), str(target))
    text = target.read_text()
    assert "1,234" in text
    assert "## Some CPU, 2 cores\n\n`python bench.py`" in text
    missing = text.split("## Not measured yet on an NVIDIA GPU")[1]
    assert f"- pretrain: {bench.REAL}" in missing
    assert "- study: " in missing
    on_gpu = {**row, "machine": {**machine, "device": "NVIDIA H200"}}
    source.write_text(json.dumps(on_gpu) + "\n")
    bench.write_report(str(source), str(target))
    assert f"- pretrain: {bench.REAL}" not in target.read_text()


def test_the_recorded_lines_give_the_recorded_report(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    bench.write_report("benchmarks.jsonl", str(tmp_path / "report.md"))
    assert (tmp_path / "report.md").read_text() == (ROOT / "BENCHMARKS.md").read_text()


@pytest.mark.parametrize("line", ["no json", "[1]", '{"task": "pretrain", "variant": "x", "machine": {"device": "y"}}'])
def test_a_report_of_foreign_lines_is_refused(line, tmp_path):
    (tmp_path / "lines.jsonl").write_text(line + "\n")
    with pytest.raises(EngineError, match="line 1"):
        bench.write_report(str(tmp_path / "lines.jsonl"), str(tmp_path / "report.md"))


@pytest.mark.parametrize("flags", [["--batch_size", "0"], ["--repeats", "-1"], ["--report", "absent.jsonl"]])
def test_wrong_use_ends_in_one_line(flags, tmp_path):
    done = run(tmp_path, "--device", "cpu", *flags)
    assert done.returncode == 2
    assert flags[0] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
