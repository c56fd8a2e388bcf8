"""What follows a network: the moving average of a teacher, its momentum, and the weight decay that grows."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL_ENCODER, spread
from small_runs import SMALL, drawn_root, refusal, run
from torch import nn

from models import ViT
from teacher import Teacher, momentum_at
from trainer import Plan, Trainer, kept_bytes

QUICK = settings(deadline=None, database=None, max_examples=40)
MOMENTA = st.floats(0, 1)
STEPS = st.integers(1, 400)


class WithHead(ViT):
    """A network that has more weights than the teacher."""

    def __init__(self):
        super().__init__(**SMALL_ENCODER)
        self.head = nn.Linear(self.embed_dim, 3)


def encoder_and_student() -> tuple[ViT, WithHead]:
    """Make an encoder, and a network of which it is a part and whose weights are others."""
    return spread(ViT(**SMALL_ENCODER), seed=1), spread(WithHead(), seed=2)


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


# -- The moving average -------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(MOMENTA, min_size=1, max_size=4))
def test_weights_are_the_moving_average_of_those_that_they_follow(momenta):
    encoder, student = encoder_and_student()
    teacher = Teacher(encoder)
    expected = {name: value.double() for name, value in weights_of(encoder).items()}
    for number, momentum in enumerate(momenta):
        spread(student, seed=number)
        teacher.update(student, momentum)
        for name, value in student.state_dict().items():
            if name in expected:
                expected[name] = momentum * expected[name] + (1 - momentum) * value.double()
    for name, value in teacher.network.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_one_step_is_exact():
    teacher = Teacher(nn.Linear(2, 1, bias=False))
    teacher.network.weight.copy_(torch.tensor([[1.0, -2.0]]))
    student = nn.Linear(2, 1, bias=False)
    student.weight.data = torch.tensor([[3.0, 6.0]])
    teacher.update(student, 0.75)
    assert teacher.network.weight.tolist() == [[1.5, 0.0]]


def test_momentum_1_keeps_every_weight_and_momentum_0_takes_the_students():
    encoder, student = encoder_and_student()
    teacher = Teacher(encoder)
    before = weights_of(teacher.network)
    teacher.update(student, 1.0)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    teacher.update(student, 0.0)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name


def test_what_is_not_trained_stays_as_it_was_copied():
    encoder, student = encoder_and_student()
    teacher = Teacher(encoder)
    positions = encoder.pos_embed.clone()
    student.pos_embed += 1
    teacher.update(student, 0.0)
    assert torch.equal(teacher.network.pos_embed, positions)


def test_the_copy_shares_no_memory_and_has_no_gradient():
    encoder, student = encoder_and_student()
    teacher = Teacher(encoder)
    before = weights_of(teacher.network)
    spread(encoder)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    images = torch.randn(2, 3, 32, 32)
    loss = (student(images) - teacher(images)).square().mean()
    loss.backward()
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert student.blocks[0].attn.qkv.weight.grad.any()


def test_its_state_brings_it_back_to_the_bit():
    encoder, student = encoder_and_student()
    teacher = Teacher(encoder)
    teacher.update(student, 0.3)
    state = copy.deepcopy(teacher.state())
    other = Teacher(ViT(**SMALL_ENCODER))
    other.load_state(state)
    followed = spread(student, seed=5)
    for one in (teacher, other):
        one.update(followed, 0.9)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name


def test_it_is_compiled_for_the_batches_of_training_and_never_for_others(monkeypatch):
    sizes = []

    def compile_network(network, **options):
        def call(images):
            sizes.append(len(images))
            return network(images)

        return call

    monkeypatch.setattr(torch, "compile", compile_network)
    encoder, _ = encoder_and_student()
    teacher = Teacher(encoder)
    teacher.compile()
    outputs = []
    with torch.no_grad():
        outputs.append(teacher(torch.ones(4, 3, 32, 32)))  # validation, before the first step after a resume
    outputs.append(teacher(torch.ones(4, 3, 32, 32)))
    with torch.no_grad():
        outputs.append(teacher(torch.ones(4, 3, 32, 32)))
        outputs.append(teacher(torch.ones(3, 3, 32, 32)))
    assert sizes == [4, 4]
    for output in outputs:
        assert not output.requires_grad
        torch.testing.assert_close(output[:3], outputs[0][:3])


# -- Momentum -----------------------------------------------------------------------------------------------------------


@QUICK
@given(STEPS, MOMENTA, st.sampled_from(["linear", "cosine"]))
def test_momentum_rises_from_the_start_to_the_end_and_never_leaves_the_range(total, start, shape):
    momenta = [momentum_at(step, total, start, 1.0, shape) for step in range(1, total + 1)]
    assert momenta == sorted(momenta)
    assert momenta[0] == pytest.approx(start)
    assert momenta[-1] <= 1
    assert momentum_at(total + 1, total, start, 1.0, shape) == pytest.approx(1)


@QUICK
@given(STEPS, STEPS, MOMENTA, MOMENTA)
def test_momentum_is_a_line_or_half_a_cosine(step, total, start, end):
    step = min(step, total)
    share = (step - 1) / total
    assert momentum_at(step, total, start, end) == pytest.approx((1 - share) * start + share * end)
    expected = end - (end - start) * (math.cos(math.pi * share) + 1) / 2
    assert momentum_at(step, total, start, end, "cosine") == pytest.approx(expected)


def test_another_shape_of_momentum_is_refused_by_its_name():
    with pytest.raises(ValueError, match="linear or cosine, got 'step'"):
        momentum_at(1, 2, 0.9, shape="step")


# -- Weight decay -------------------------------------------------------------------------------------------------------


def plan(total: int, decays: tuple[float, float] | None) -> Plan:
    return Plan(1, 1, total, 0, 8, 1e-3, 0.0, "cosine", [], weight_decays=decays)


@QUICK
@given(STEPS, st.floats(1e-3, 1), st.floats(0, 1))
def test_weight_decay_is_half_a_cosine_from_the_start_to_the_end(total, start, end):
    decays = [plan(total, (start, end)).weight_decay_at(step) for step in range(total)]
    for step, decay in enumerate(decays):
        expected = end + (start - end) * math.cos(math.pi * step / total / 2) ** 2
        assert decay == pytest.approx(expected, abs=1e-9)
    assert decays[0] == pytest.approx(start)
    assert decays == sorted(decays, reverse=start > end)
    assert plan(total, None).weight_decay_at(0) is None


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    words = ["--objective ijepa --model mae_demo --batch_size 8 --epochs 2 --epoch_updates 3 --warmup_epochs 0"]
    words += [*SMALL, "--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path_factory.mktemp("cache")]
    return [*words, "--no-meters --target_blocks 1 --val_epochs 2"]


def test_the_optimizer_is_given_each_steps_weight_decay_and_spares_norms_biases_and_tokens(
    flags, tmp_path, monkeypatch
):
    used = []
    step = Trainer._step_optimizer

    def watched(trainer, *args):
        used.append([group["weight_decay"] for group in trainer.optimizer.param_groups])
        spared = [group for group in trainer.plan.groups if group["weight_decay"] == 0]
        names = {name for group in spared for name in group["names"]}
        assert {"cls_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= names
        assert not any(name.endswith("qkv.weight") for name in names)
        return step(trainer, *args)

    monkeypatch.setattr(Trainer, "_step_optimizer", watched)
    run("pretrain", *flags, "--weight_decay 0.1 --weight_decay_end 0.9", "--output_dir", tmp_path / "run")
    expected = [0.5 - 0.4 * math.cos(math.pi * number / 6) for number in range(6)]
    assert sorted(used[0]) == [0, pytest.approx(0.1)]
    assert [max(decays) for decays in used] == pytest.approx(expected)
    assert [min(decays) for decays in used] == [0] * 6


def test_a_schedule_that_begins_at_no_weight_decay_is_refused(flags, tmp_path):
    message = refusal("pretrain", *flags, "--weight_decay 0", "--output_dir", tmp_path / "run")
    assert "--weight_decay 0 cannot grow to --weight_decay_end 0.4; begin above 0, say at 0.04, or give" in message
    assert not (tmp_path / "run").exists()


def test_no_weight_decay_at_either_end_is_none_at_all(flags, tmp_path):
    words = ["--weight_decay 0 --weight_decay_end 0 --epochs 1 --epoch_updates 1", "--output_dir", tmp_path / "run"]
    run("pretrain", *flags, *words)
    saved = torch.load(tmp_path / "run/model.pt", weights_only=True)
    assert saved["model"]


def test_what_an_objective_keeps_counts_its_teacher_and_every_other_tensor():
    teacher = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
    state = {"teacher": teacher, "centre": torch.zeros(5, dtype=torch.float64), "losses": {"loss": 0.5}}
    assert kept_bytes(state) == 4 * 15 + 8 * 5
    assert kept_bytes({}) == 0
