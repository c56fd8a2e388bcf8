"""Networks that are fine-tuned: segmenters, classifiers, ResNet-50, and stochastic depth."""

import math

import pytest
import torch
from small_models import SMALL, SMALL_ENCODER, encode, relative_error, spread

from models import (
    BUILDERS,
    Classifier,
    LinearSegmenter,
    MAESegmenter,
    MaskedAutoencoder,
    ResNet50Classifier,
    ResNet50Segmenter,
    build_classifier,
    build_segmenter,
    drop_path_scales,
    patchify,
)
from weights import load_pretrained


def make_classifier(**kwargs) -> Classifier:
    return Classifier(num_classes=5, **{**SMALL_ENCODER, **kwargs})


def make_segmenter(**kwargs) -> MAESegmenter:
    return MAESegmenter(**{**SMALL, **kwargs})


def make_linear_segmenter(**kwargs) -> LinearSegmenter:
    return LinearSegmenter(**{**SMALL_ENCODER, **kwargs})


TRANSFORMERS = [make_segmenter, make_linear_segmenter, make_classifier]
ALL = [*TRANSFORMERS, ResNet50Segmenter, lambda **kwargs: ResNet50Classifier(5, **kwargs)]


def counted_products(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Count a forward pass as torch does, without attention, whose kernels it does not all know."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    total = 0
    for operation, count in counter.get_flop_counts()["Global"].items():
        if "attention" not in str(operation):
            total += count
    return total


# ---------------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("make", ALL)
def test_every_network_that_is_fine_tuned_has_the_same_attributes_and_call(make):
    model = make(img_size=64).eval()
    assert model.img_size == (64, 64)
    assert isinstance(model.fresh_keys, tuple)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(model(images, None), logits)
    assert logits.shape[:2] == (2, model.num_classes)
    assert model.flops(training=True) > 2 * model.flops(training=False) > 0
    assert model.flops(mask_ratio=0.0) == model.flops()


@pytest.mark.parametrize("make", ALL)
def test_every_trainable_parameter_has_a_gradient(make):
    model = make(img_size=64)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()  # else several processes would wait for each other
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", ALL)
def test_no_layer_of_a_network_is_empty(make):
    assert not any(isinstance(module, torch.nn.Identity) for module in make(img_size=64).modules())


@pytest.mark.parametrize("make", TRANSFORMERS)
def test_position_embeddings_are_trained(make):
    assert make().pos_embed.requires_grad


def test_a_decoders_positions_are_trained_too_but_not_its_unused_mask_token():
    model = make_segmenter()
    assert model.decoder_pos_embed.requires_grad
    assert not model.mask_token.requires_grad


def test_every_kind_of_checkpoint_has_a_builder():
    assert set(BUILDERS) == {"mae", "vit", "segmenter", "classifier"}


# ---------------------------------------------------------------------------------------------------------------------
# Segmentation


@pytest.mark.parametrize("make", [make_segmenter, make_linear_segmenter])
def test_a_segmenter_gives_one_logit_per_class_and_pixel_in_place(make):
    model = make(num_classes=5)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5, 32, 32)
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.bias.copy_(torch.arange(8 * 8 * 5.0))
        logits = model(torch.randn(1, 3, 32, 32))
    first = (1 * 8 + 2) * 5.0  # pixel (9, 18) is row 1, column 2 of its patch
    assert torch.equal(logits[0, :, 9, 18], torch.arange(first, first + 5))


def test_a_segmenter_computes_what_the_autoencoder_does_without_masking():
    autoencoder = spread(MaskedAutoencoder(**SMALL))
    segmenter = make_segmenter()
    segmenter.load_state_dict(autoencoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, pred, _ = autoencoder(images, mask_ratio=0)
        logits = segmenter(images)
    assert torch.equal(patchify(logits, 8), pred)


def test_a_segmenter_never_takes_the_pixel_predictor():
    pretrained = spread(MaskedAutoencoder(**SMALL))
    segmenter = make_segmenter()
    assert pretrained.decoder_pred.weight.shape == segmenter.decoder_pred.weight.shape
    before = segmenter.decoder_pred.weight.detach().clone()
    report = load_pretrained(segmenter, pretrained.state_dict())
    assert torch.equal(segmenter.decoder_pred.weight, before)
    assert report.new_head == ["decoder_pred.weight", "decoder_pred.bias"]
    assert "new head 2 (decoder_pred)" in str(report)
    assert torch.equal(segmenter.decoder_blocks[0].attn.qkv.weight, pretrained.decoder_blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_the_last_layer_of_a_segmenter_is_initialised_like_the_others(num_classes):
    torch.manual_seed(0)
    layer = make_segmenter(num_classes=num_classes).decoder_pred
    bound = math.sqrt(6 / (16 + 64 * num_classes))
    assert layer.weight.shape == (64 * num_classes, 16)
    assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert (layer.bias == 0).all()


def test_a_seed_gives_a_segmenter_the_initial_weights_of_recorded_runs():
    """The autoencoder first, then a new last layer: the order in which the random numbers have always been taken."""
    torch.manual_seed(3)
    autoencoder = MaskedAutoencoder(**SMALL)
    last = torch.nn.Linear(16, 8 * 8 * 3)
    torch.nn.init.xavier_uniform_(last.weight)
    following = torch.rand(1)
    torch.manual_seed(3)
    segmenter = make_segmenter()
    assert torch.equal(torch.rand(1), following)
    assert torch.equal(segmenter.decoder_pred.weight, last.weight)
    for name in ("cls_token", "mask_token", "patch_embed.proj.weight", "decoder_blocks.0.mlp.fc2.weight"):
        assert torch.equal(segmenter.state_dict()[name], autoencoder.state_dict()[name])


def test_the_linear_head_has_no_decoder_and_learns():
    model = build_segmenter("mae_tiny", img_size=32, head="linear")
    others = {key for key in model.state_dict() if not key.startswith(("blocks.", "norm.", "patch_embed."))}
    assert others == {"cls_token", "pos_embed", "decoder_pred.weight", "decoder_pred.bias"}
    small = make_linear_segmenter()
    report = load_pretrained(small, MaskedAutoencoder(**SMALL).state_dict())
    assert report.missing == []
    assert report.new_head == ["decoder_pred.weight", "decoder_pred.bias"]
    small(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.decoder_pred.parameters())


@pytest.mark.parametrize(("head", "kind"), [("decoder", MAESegmenter), ("linear", LinearSegmenter)])
def test_the_head_picks_the_class(head, kind):
    assert type(build_segmenter("mae_tiny", img_size=32, head=head)) is kind


def test_a_wrong_head_is_refused_by_name():
    with pytest.raises(ValueError, match="head must be decoder or linear, got 'mlp'"):
        build_segmenter("mae_tiny", img_size=32, head="mlp")


@pytest.mark.parametrize(("make", "widths"), [(make_segmenter, [32, 32, 16]), (make_linear_segmenter, [32, 32])])
def test_flops_of_a_segmenter_equal_the_products_that_torch_counts(make, widths):
    model = make()
    products = counted_products(model, torch.randn(1, 3, 32, 32))
    attention = sum(4 * 17**2 * width for width in widths)  # 4 N^2 D a block
    last = 2 * 192 * model.decoder_pred.in_features  # the class token's row, counted by the reference formulation
    assert model.flops(training=False) == pytest.approx(products + attention + last)


def test_flops_of_the_base_segmenter_equal_the_count_by_hand():
    with torch.device("meta"):
        model = build_segmenter("mae_base")
    assert model.flops() / 1e9 == pytest.approx(137.730, abs=1e-3)
    assert model.flops(training=False) / 1e9 == pytest.approx(45.987, abs=1e-3)


def test_inputs_need_not_be_square():
    for make in (make_segmenter, make_linear_segmenter):
        assert make(img_size=(24, 40))(torch.randn(2, 3, 24, 40)).shape == (2, 3, 24, 40)
    assert make_classifier(img_size=(24, 40))(torch.randn(2, 3, 24, 40)).shape == (2, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Classification


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifier_is_a_linear_layer_on_the_pooled_features(pooling):
    torch.manual_seed(0)
    model = spread(make_classifier(pooling=pooling))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_blocks(patchify(images, model.patch_size))
        if pooling == "cls":
            pooled = encode(model, images)[:, 0]
        else:
            pooled = model.fc_norm(sum(tokens[:, i] for i in range(1, 17)) / 16)
            assert (
                relative_error(pooled, encode(model, images)[:, 1:].mean(1)) > 1e-2
            )  # not the mean of normalised tokens
    expected = pooled @ model.head.weight.T + model.head.bias
    with torch.no_grad():
        assert relative_error(model(images), expected) <= 1e-5


def test_a_classifier_takes_the_encoder_and_nothing_else():
    pretrained = spread(MaskedAutoencoder(**SMALL))
    model = make_classifier()
    before = model.head.weight.detach().clone()
    state = pretrained.state_dict()
    state["head.weight"] = torch.ones(5, 32)  # timm's name for the layer of a supervised network
    report = load_pretrained(model, state)
    assert report.new_head == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert report.missing == []
    assert torch.equal(model.head.weight, before)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encode(model, images), encode(pretrained, images))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifier_learns_two_images_apart(pooling):
    torch.manual_seed(0)
    model = make_classifier(pooling=pooling)
    images = torch.randn(2, 3, 32, 32)
    labels = torch.tensor([3, 1])
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model(images).argmax(1), labels)


def test_flops_of_a_classifier_equal_the_products_that_torch_counts():
    model = make_classifier()
    products = counted_products(model, torch.randn(1, 3, 32, 32))
    assert model.flops(training=False) == pytest.approx(products + 2 * 4 * 17**2 * 32)


def test_a_wrong_pooling_is_refused_by_name():
    with pytest.raises(ValueError, match="pooling must be mean or cls, got 'max'"):
        build_classifier("mae_tiny", img_size=32, pooling="max")


def test_named_classifiers_build():
    model = build_classifier("mae_tiny", num_classes=37, img_size=32, pooling="cls", drop_path=0.1)
    assert isinstance(model, Classifier)
    assert model.head.weight.shape == (37, 192)
    assert model.drop_rates[-1] == pytest.approx(0.1)
    assert isinstance(build_classifier("resnet50", num_classes=4, img_size=64), ResNet50Classifier)


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic depth


@pytest.mark.parametrize("make", TRANSFORMERS)
@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_rate_that_drops_everything_or_less_than_nothing_is_refused(make, rate):
    with pytest.raises(ValueError, match="drop_path"):
        make(drop_path=rate)


@pytest.mark.parametrize("make", TRANSFORMERS)
def test_drop_path_rates_grow_linearly_and_are_not_part_of_a_checkpoint(make):
    model = make(depth=4, drop_path=0.3)
    assert torch.allclose(model.drop_rates, torch.tensor([0.0, 0.1, 0.2, 0.3]))
    assert "drop_rates" not in model.state_dict()


@pytest.mark.parametrize("make", TRANSFORMERS)
def test_rate_zero_drops_nothing_and_leaves_no_buffer_to_broadcast(make):
    model = make(drop_path=0.0)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images, torch.zeros(2, 2, 2)), model(images))
    assert list(model.buffers()) == []


@pytest.mark.parametrize("make", TRANSFORMERS)
def test_the_draws_decide_which_images_lose_branches(make):
    torch.manual_seed(0)
    model = spread(make(drop_path=0.5))
    images = torch.randn(2, 3, 32, 32)
    draws = torch.zeros(2, 2, 2)  # the first image loses both branches of the last block
    draws[1] = 0.9  # the second keeps them, at twice their size
    scales = drop_path_scales(draws, torch.tensor([0.0, 0.5]))
    assert scales.tolist() == [[[1, 1], [1, 1]], [[0, 0], [2, 2]]]
    with torch.no_grad():
        features = model.forward_features(images, draws)
        assert torch.equal(features, encode(model, images, drop_path=scales))
        assert not torch.allclose(model(images, draws), model(images))


def test_a_dropped_branch_leaves_its_input_unchanged_per_sample():
    torch.manual_seed(0)
    model = spread(make_segmenter(depth=1))
    draws = torch.full((2, 1, 2), 0.9)
    draws[0] = 0.1  # the first image loses both branches of the only block
    images = torch.randn(2, 3, 32, 32)
    features = encode(model, images, drop_path=drop_path_scales(draws, torch.tensor([0.5])))
    with torch.no_grad():
        tokens = model.patch_embed(patchify(images, 8)) + model.pos_embed[:, 1:]
        cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1)
        x = torch.cat([cls_token, tokens], dim=1)
        block = model.blocks[0]
        doubled = x + 2 * block.attn(block.norm1(x))  # kept branches count 1 / (1 - 0.5)
        doubled = doubled + 2 * block.mlp(block.norm2(doubled))
        assert torch.allclose(features[0], model.norm(x)[0], atol=1e-6)
        assert torch.allclose(features[1], model.norm(doubled)[1], atol=1e-5)


def test_drop_path_keeps_the_expectation_and_drops_branches_independently():
    torch.manual_seed(0)
    rates = torch.tensor([0.0, 0.1, 0.5])
    n = 20_000
    scales = drop_path_scales(torch.rand(n, 3, 2), rates)
    assert scales.shape == (3, n, 2)
    assert (scales[0] == 1).all()
    for i, rate in enumerate(rates.tolist()[1:], start=1):
        deviation = math.sqrt(rate / (1 - rate) / n)
        assert (scales[i].mean(0) - 1).abs().max() < 5 * deviation
        assert set(scales[i].unique().tolist()) == {0.0, (1 / (1 - rates[i])).item()}
    assert abs(torch.corrcoef(scales[2].T)[0, 1]) < 5 / math.sqrt(n)


# ---------------------------------------------------------------------------------------------------------------------
# ResNet-50


def test_resnet50_gives_logits_of_the_input_size_and_counts_its_cost():
    model = build_segmenter("resnet50")
    assert isinstance(model, ResNet50Segmenter)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    assert not any("fc." in key for key in model.state_dict())
    backbone = 2 * 4.09e9  # 4.09 GMAC, torchvision's table
    assert model.flops(training=False) == pytest.approx(backbone + decoder_flops_by_hand(7), rel=0.003)


def decoder_flops_by_hand(side: int) -> int:
    """Count the convolutions of ResNet-50's decoder: 9 products and sums for each pair of channels and input pixel."""
    total = 2 * 9 * 2048 * 1024 * side**2
    for channels_in, channels_out in [(1024, 512), (512, 256), (256, 128), (128, 64), (64, 3)]:
        total += 2 * 9 * channels_in * channels_out * side**2
        side *= 2
    return total


def test_resnet50_has_the_parameters_of_the_studys_network():
    with torch.device("meta"):
        model = build_segmenter("resnet50")
    count = sum(parameter.numel() for parameter in model.parameters())
    unused = 2048 * 1000 + 1000  # the study's count includes the classifier that its network does not use
    assert count == 48_656_963
    assert count + unused == 50_705_963


def test_the_decoder_of_resnet50_doubles_the_size_five_times():
    model = build_segmenter("resnet50", img_size=64)
    kinds = [type(layer).__name__ for layer in model.decoder]
    doubling = ["ConvTranspose2d", "BatchNorm2d", "ReLU"]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", *doubling * 4, "ConvTranspose2d"]
    convolutions = [layer for layer in model.decoder if hasattr(layer, "kernel_size")]
    assert [layer.out_channels for layer in convolutions] == [1024, 512, 256, 128, 64, 3]
    assert all(layer.kernel_size == (3, 3) for layer in convolutions)
    x = torch.randn(1, 2048, 2, 3)
    sides = []
    for layer in model.decoder:
        x = layer(x)
        if hasattr(layer, "kernel_size"):
            sides.append(tuple(x.shape[2:]))
    assert sides == [(2, 3), (4, 6), (8, 12), (16, 24), (32, 48), (64, 96)]


@pytest.mark.parametrize("size", [48, (64, 80), 225])
def test_resnet50_refuses_a_size_that_its_stride_does_not_divide(size):
    with pytest.raises(ValueError, match="not divisible by 32"):
        build_segmenter("resnet50", img_size=size)


def test_resnet50_counts_the_products_that_torch_counts_at_its_own_size():
    model = build_segmenter("resnet50", img_size=(64, 96)).eval()
    forward = counted_products(model, torch.randn(1, 3, 64, 96))
    assert model.flops(training=False) == forward
    first = 2 * 64 * 3 * 7 * 7 * 32 * 48
    assert model.flops() == 3 * forward - first
    assert model.backbone.conv1.weight.device.type == "cpu"


def test_a_resnet50_classifier_of_an_odd_size_counts_what_torch_counts():
    model = build_classifier("resnet50", num_classes=5, img_size=(50, 75)).eval()
    assert model.flops(training=False) == counted_products(model, torch.randn(1, 3, 50, 75))


def test_resnet50_masks_nothing():
    with pytest.raises(ValueError, match="mask_ratio"):
        build_segmenter("resnet50", img_size=64).flops(mask_ratio=0.75)


def test_a_resnet50_classifier_equals_torchvisions_network():
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = build_classifier("resnet50", num_classes=1000, img_size=64).eval()
    peer = resnet50(weights=None).eval()
    state = {key.removeprefix("backbone."): value for key, value in model.state_dict().items()}
    state["fc.weight"] = state.pop("head.weight")
    state["fc.bias"] = state.pop("head.bias")
    peer.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), peer(images))


def test_a_seed_gives_resnet50_the_weights_of_torchvisions():
    from torchvision.models import resnet50

    torch.manual_seed(0)
    ours = build_segmenter("resnet50", img_size=64).backbone.state_dict()
    torch.manual_seed(0)
    theirs = resnet50(weights=None).state_dict()
    assert list(ours) == [key for key in theirs if not key.startswith("fc.")]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_resnet50_classifier_takes_the_backbone_of_a_segmenter():
    source = build_segmenter("resnet50", img_size=64)
    model = build_classifier("resnet50", num_classes=4, img_size=64)
    config = {"kind": "segmenter", "name": "resnet50", "img_size": 64}
    report = load_pretrained(model, {"model": source.state_dict(), "model_config": config})
    assert (report.missing, report.new_head) == ([], ["head.weight", "head.bias"])
    assert report.unexpected
    assert all(key.startswith("decoder.") for key in report.unexpected)
    assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight)
