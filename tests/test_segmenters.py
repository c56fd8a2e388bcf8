"""The segmenters: logits in place, heads that start fresh, stochastic depth, ResNet-50."""

import math

import pytest
import torch
from small_models import SMALL, spread

from models import MAESegmenter, MaskedAutoencoder, ResNet50Segmenter, build_segmenter, drop_path_scales, patchify
from weights import load_pretrained


def test_a_segmenter_gives_one_logit_per_class_and_pixel_in_place():
    model = MAESegmenter(num_classes=5, **SMALL)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5, 32, 32)
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.bias.copy_(torch.arange(8 * 8 * 5.0))
        logits = model(torch.randn(1, 3, 32, 32))
    assert torch.equal(logits[0, :, 9, 18], torch.arange((1 * 8 + 2) * 5.0, (1 * 8 + 2) * 5.0 + 5))


def test_a_segmenter_never_takes_the_pixel_predictor():
    pretrained, segmenter = spread(MaskedAutoencoder(**SMALL)), MAESegmenter(**SMALL)
    assert pretrained.decoder_pred.weight.shape == segmenter.decoder_pred.weight.shape
    before = segmenter.decoder_pred.weight.detach().clone()
    report = load_pretrained(segmenter, pretrained.state_dict())
    assert torch.equal(segmenter.decoder_pred.weight, before)
    assert report.new_head == ["decoder_pred.weight", "decoder_pred.bias"]
    assert "new head 2 (decoder_pred)" in str(report)
    assert torch.equal(segmenter.decoder_blocks[0].attn.qkv.weight, pretrained.decoder_blocks[0].attn.qkv.weight)


def test_the_linear_head_has_no_decoder_and_learns():
    model = MAESegmenter(head="linear", **SMALL)
    assert not any(k.startswith(("decoder_blocks", "decoder_embed", "mask_token")) for k in model.state_dict())
    report = load_pretrained(model, MaskedAutoencoder(**SMALL).state_dict())
    assert report.missing == []
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder_pred.parameters())


@pytest.mark.parametrize(("argument", "value"), [("head", "mlp"), ("drop_path", 1.0), ("drop_path", -0.1)])
def test_a_wrong_segmenter_argument_is_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=argument):
        MAESegmenter(**SMALL, **{argument: value})


def test_drop_path_rates_grow_linearly_and_rate_zero_drops_nothing():
    model = MAESegmenter(**{**SMALL, "depth": 4}, drop_path=0.3)
    assert torch.allclose(model.drop_rates, torch.tensor([0.0, 0.1, 0.2, 0.3]))
    assert "drop_rates" not in model.state_dict()
    still, images = MAESegmenter(**SMALL, drop_path=0.0), torch.randn(2, 3, 32, 32)
    assert torch.equal(still(images, torch.zeros(2, 2, 2)), still(images))


def test_a_dropped_branch_leaves_its_input_unchanged_per_sample():
    torch.manual_seed(0)
    model = spread(MAESegmenter(**{**SMALL, "depth": 1}, drop_path=0.0))
    model.drop_rates = torch.tensor([0.5])
    draws = torch.ones(2, 1, 2) * 0.9
    draws[0] = 0.1  # the first image loses both branches of the only block
    images = torch.randn(2, 3, 32, 32)
    patches = patchify(images, 8)
    features = model.forward_encoder(patches, drop_path=drop_path_scales(draws, model.drop_rates))
    with torch.no_grad():
        tokens = model.patch_embed(patches) + model.pos_embed[:, 1:]
        x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1), tokens], dim=1)
        block = model.blocks[0]
        doubled = x + 2 * block.attn(block.norm1(x))  # kept branches count 1 / (1 - 0.5)
        doubled = doubled + 2 * block.mlp(block.norm2(doubled))
        assert torch.allclose(features[0], model.norm(x)[0], atol=1e-6)
        assert torch.allclose(features[1], model.norm(doubled)[1], atol=1e-5)


def test_drop_path_keeps_the_expectation_and_drops_branches_independently():
    torch.manual_seed(0)
    rates, n = torch.tensor([0.0, 0.1, 0.5]), 20_000
    scales = drop_path_scales(torch.rand(n, 3, 2), rates)
    assert scales.shape == (3, n, 2)
    assert (scales[0] == 1).all()
    for i, rate in enumerate(rates.tolist()[1:], start=1):
        deviation = math.sqrt(rate / (1 - rate) / n)
        assert (scales[i].mean(0) - 1).abs().max() < 5 * deviation
        assert set(scales[i].unique().tolist()) == {0.0, (1 / (1 - rates[i])).item()}
    assert abs(torch.corrcoef(scales[2].T)[0, 1]) < 5 / math.sqrt(n)


def test_resnet50_gives_logits_of_the_input_size_and_counts_its_cost():
    model = build_segmenter("resnet50")
    assert isinstance(model, ResNet50Segmenter)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    assert not any("fc." in k for k in model.state_dict())
    assert model.flops(training=False) / 1e9 == pytest.approx(2 * 4.09, rel=0.01)  # 4.09 GMAC, torchvision's table
