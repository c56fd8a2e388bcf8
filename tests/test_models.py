"""The models against slow formulas, published counts and the peers' implementations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL, SMALL_ENCODER, encode, encoder_only, relative_error, spread, transformers_mae

from models import (
    MODELS,
    MAESegmenter,
    MaskedAutoencoder,
    ViT,
    build_mae,
    build_vit,
    interpolate_pos_embed,
    patchify,
    sincos_pos_embed,
    take_rows,
    unpatchify,
)
from weights import load_pretrained, reference_keys

# ---------------------------------------------------------------------------------------------------------------------
# Peers


WIDER = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
}


@pytest.mark.parametrize(
    ("img_size", "patch_size", "mask_ratio", "norm_pix_loss", "sizes"),
    [
        (32, 8, 0.75, True, SMALL),
        (32, 8, 0.5, False, SMALL),
        (48, 16, 0.25, True, WIDER),
        (64, 8, 0.9, True, WIDER),
        (224, 16, 0.75, True, WIDER),
    ],
)
def test_loss_prediction_and_every_gradient_equal_transformers(img_size, patch_size, mask_ratio, norm_pix_loss, sizes):
    torch.manual_seed(img_size)
    sizes = {**sizes, "img_size": img_size, "patch_size": patch_size}
    peer = spread(transformers_mae(norm_pix_loss, mask_ratio, **sizes))
    model = MaskedAutoencoder(norm_pix_loss=norm_pix_loss, **sizes)
    assert load_pretrained(model, peer.state_dict()).missing == []
    images = torch.randn(3, 3, img_size, img_size)
    noise = torch.rand(3, model.num_patches)

    loss, pred, mask = model(images, mask_ratio, noise)
    loss.backward()
    expected = peer(images, noise=noise)
    expected.loss.backward()

    assert abs(loss - expected.loss) <= 1e-5 * abs(expected.loss)
    assert relative_error(pred, expected.logits) <= 1e-5
    assert torch.equal(mask, expected.mask)
    _, gradients = reference_keys({name: p.grad for name, p in peer.named_parameters() if p.grad is not None})
    own = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        parts, references = [gradient], [gradients[name]]
        if name.endswith("qkv.bias"):  # softmax ignores a shift of all keys: the key bias has no gradient but rounding
            (q, k, v), (peer_q, _, peer_v) = gradient.chunk(3), gradients[name].chunk(3)
            assert k.abs().max() <= 1e-6
            parts, references = [q, v], [peer_q, peer_v]
        for part, reference in zip(parts, references, strict=True):
            assert relative_error(part, reference) <= 1e-5, name


def timm_features(model, images):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    vit = timm.create_model(
        "vit_base_patch16_224",
        img_size=model.img_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        num_classes=0,
    )
    vit.load_state_dict(encoder_only(model.state_dict()))  # strict: timm's encoder has exactly these keys and shapes
    with torch.no_grad():
        return vit.eval().forward_features(images)


@pytest.mark.parametrize("sizes", [dict(depth=12, decoder_depth=1), dict(depth=2, embed_dim=96, num_heads=3)])
def test_encoder_features_equal_timm_vit_base(sizes):
    torch.manual_seed(0)
    model = spread(MaskedAutoencoder(**sizes), std=0.01)
    images = torch.randn(1, 3, 224, 224)
    assert relative_error(encode(model, images), timm_features(model, images)) <= 1e-5


def test_features_without_masking_equal_the_plain_vit_and_the_loss_is_finite():
    torch.manual_seed(0)
    model = spread(MaskedAutoencoder(**SMALL))
    images = torch.randn(2, 3, 32, 32)
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    loss, pred, mask = model(images, mask_ratio=0)
    assert torch.isfinite(loss)
    assert pred.shape == (2, 16, 192)
    assert not mask.any()
    assert relative_error(seen[0], timm_features(model, images)) <= 1e-5


@pytest.mark.parametrize("img_size", [32, (24, 40)])
def test_an_encoder_alone_gives_timms_features_and_those_of_the_autoencoder(img_size):
    torch.manual_seed(0)
    model = spread(ViT(**{**SMALL_ENCODER, "img_size": img_size}))
    images = torch.randn(2, 3, *model.img_size)
    with torch.no_grad():
        features = model(images)
    assert features.shape == (2, 1 + model.num_patches, 32)
    assert relative_error(features, timm_features(model, images)) <= 1e-5
    autoencoder = MaskedAutoencoder(**{**SMALL, "img_size": img_size})
    autoencoder.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(encode(autoencoder, images), features)


def test_a_named_encoder_has_the_keys_and_the_width_of_the_named_autoencoder():
    model, autoencoder = build_vit("mae_tiny", img_size=32), build_mae("mae_tiny", img_size=32)
    assert list(model.state_dict()) == list(encoder_only(autoencoder.state_dict()))
    assert model.embed_dim == 192
    assert build_vit("mae_tiny", img_size=32, depth=2, drop_path=0.2).drop_rates.tolist() == pytest.approx([0, 0.2])


# ---------------------------------------------------------------------------------------------------------------------
# Size, initialisation, positions, cost


def test_mae_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = build_mae("mae_base")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 111_655_680
    assert sum(p.numel() for p in model.parameters()) == 111_907_840


def test_flops_of_the_base_model_equal_the_count_by_hand():
    with torch.device("meta"):
        model = build_mae("mae_base")
    assert model.flops(mask_ratio=0.75) / 1e9 == pytest.approx(58.456, abs=1e-3)
    assert model.flops(training=False, mask_ratio=0.75) / 1e9 == pytest.approx(19.562, abs=1e-3)


def test_flops_of_an_encoder_are_those_of_the_autoencoder_without_its_decoder():
    encoder, autoencoder = ViT(**SMALL_ENCODER), MaskedAutoencoder(**SMALL)
    for ratio, tokens in ((0.0, 17), (0.75, 5)):
        decoder = autoencoder.flops(training=False, mask_ratio=ratio) - encoder.flops(training=False, mask_ratio=ratio)
        products = 2 * tokens * 32 * 16 + 2 * 17 * (12 * 16**2 + 16 * 192)  # embedding; one block of 12 D^2, prediction
        assert decoder == products + 4 * 17**2 * 16


def test_initialisation_follows_the_published_formulas():
    torch.manual_seed(0)
    model = MaskedAutoencoder()
    check_initialisation(model)
    check_token(model.mask_token)


def test_an_encoder_alone_is_initialised_alike():
    torch.manual_seed(0)
    check_initialisation(ViT())


def check_token(token):
    assert token.std().item() == pytest.approx(0.02, rel=0.15)
    assert abs(token.mean().item()) < 5 * 0.02 / math.sqrt(token.numel())


def check_initialisation(model):
    check_token(model.cls_token)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert module.eps == 1e-6
        elif isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            weight = module.weight.detach().flatten(1)  # the patch projection counts as a matrix [768, 3*16*16]
            bound = math.sqrt(6 / sum(weight.shape))
            assert (module.bias == 0).all(), name
            assert 0.999 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01), name
            assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * weight.numel()), name


def slow_position(dim: int, row: int, column: int) -> list[float]:
    """One position's code by the definition: half for the column, half for the row, each sines then cosines."""
    code = []
    for coordinate in (column, row):
        angles = [coordinate / 10000 ** (2 * i / (dim / 2)) for i in range(dim // 4)]
        code += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return code


@pytest.mark.parametrize(("dim", "grid"), [(768, (14, 14)), (512, (14, 14)), (16, (2, 5)), (64, (7, 3))])
def test_position_embeddings_equal_the_slow_formula(dim, grid):
    rows = [[0.0] * dim] + [slow_position(dim, r, c) for r in range(grid[0]) for c in range(grid[1])]
    np.testing.assert_allclose(sincos_pos_embed(dim, grid)[0].numpy(), np.array(rows), atol=1e-6)


def test_position_embeddings_are_fixed_in_pretraining():
    model = MaskedAutoencoder(**SMALL)
    assert not model.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad
    assert not ViT(**SMALL_ENCODER).pos_embed.requires_grad


def test_interpolated_positions_keep_the_class_row_and_reproduce_the_same_grid():
    table = torch.randn(1, 1 + 12, 8)
    assert torch.allclose(interpolate_pos_embed(table, (3, 4), (3, 4)), table, atol=1e-6)
    wider = interpolate_pos_embed(table, (3, 4), (5, 9))
    assert wider.shape == (1, 1 + 45, 8)
    assert torch.equal(wider[:, 0], table[:, 0])


def test_interpolated_positions_of_a_larger_grid_follow_the_smooth_code():
    stretched = interpolate_pos_embed(sincos_pos_embed(32, (14, 14)), (14, 14), (28, 28))[0, 1:].view(28, 28, 32)
    # Pixel centres: row r of the fine grid lies at (r + 0.5) / 2 - 0.5 of the coarse one.
    middle = torch.tensor(slow_position(32, (13 + 0.5) / 2 - 0.5, (10 + 0.5) / 2 - 0.5))
    assert (stretched[13, 10] - middle).abs().max() < 0.05


def test_a_position_code_that_cannot_be_split_in_four_is_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_pos_embed(30, (2, 2))


def test_every_named_size_builds():
    for name in MODELS:
        with torch.device("meta"):
            model = build_mae(name, img_size=224)
        assert model.num_patches == (224 // model.patch_size) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# Patches and masking


@given(batch=st.integers(1, 3), p=st.integers(1, 5), h=st.integers(1, 4), w=st.integers(1, 4), chans=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_patchify_and_back_is_the_identity(batch, p, h, w, chans):
    images = torch.arange(batch * chans * h * p * w * p, dtype=torch.float32).view(batch, chans, h * p, w * p)
    patches = patchify(images, p)
    assert patches.shape == (batch, h * w, p * p * chans)
    assert torch.equal(unpatchify(patches, p, (h, w)), images)
    corner = images[0, :, (h - 1) * p : h * p, (w - 1) * p : w * p].permute(1, 2, 0)  # rows, columns, channels last
    assert torch.equal(patches[0, -1], corner.flatten())


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_take_rows_equals_gather(data):
    B, L, K = (data.draw(st.integers(1, 6)) for _ in range(3))
    x = torch.randn(B, L, 3)
    ids = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, L - 1), min_size=K, max_size=K), min_size=B, max_size=B))
    )
    assert torch.equal(take_rows(x, ids), x.gather(1, ids[..., None].expand(-1, -1, 3)))


@given(
    ratio=st.floats(0.01, 0.93),
    noise=st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=16, max_size=16), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_the_patches_of_lowest_noise_stay_visible_and_ties_go_to_the_first(ratio, noise):
    model = MaskedAutoencoder(**{**SMALL, "depth": 1})
    with torch.no_grad():
        _, _, mask = model(torch.randn(len(noise), 3, 32, 32), ratio, torch.tensor(noise))
    visible = int(16 * (1 - ratio))
    for row, values in zip(mask, noise, strict=True):
        ranked = sorted(range(16), key=lambda i: (values[i], i))
        assert sorted(ranked[:visible]) == (row == 0).nonzero().flatten().tolist()


def test_masks_differ_between_images_and_are_uniform_over_patches():
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**SMALL, "depth": 1})
    with torch.no_grad():
        _, _, mask = model(torch.zeros(2000, 3, 32, 32))
    assert (mask.sum(1) == 12).all()
    assert len({tuple(row.tolist()) for row in mask}) > 1000
    assert (mask.mean(0) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 2000)


def test_masked_pixels_never_reach_the_prediction():
    torch.manual_seed(0)
    model = spread(MaskedAutoencoder(**SMALL))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        _, pred, mask = model(images, 0.75, noise)
        hidden = unpatchify(mask[..., None].expand(-1, -1, 192), 8, (4, 4))
        _, same, _ = model(images + 100 * hidden, 0.75, noise)
        _, other, _ = model(images + 0.1 * (1 - hidden), 0.75, noise)
    assert torch.equal(pred, same)
    assert not torch.allclose(pred, other)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.99, 1.5])
def test_a_mask_ratio_that_leaves_nothing_visible_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        MaskedAutoencoder(**SMALL)(torch.zeros(1, 3, 32, 32), ratio)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_equals_a_loop_over_masked_patches(norm_pix_loss):
    torch.manual_seed(0)
    model = spread(MaskedAutoencoder(**SMALL, norm_pix_loss=norm_pix_loss))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        loss, pred, mask = model(images)
    errors = []
    for b in range(2):
        for i in range(16):
            r, c = i // 4 * 8, i % 4 * 8
            target = images[b, :, r : r + 8, c : c + 8].permute(1, 2, 0).flatten().double()
            if norm_pix_loss:
                variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
                target = (target - target.mean()) / (variance + 1e-6) ** 0.5
            if mask[b, i]:
                errors.append(((pred[b, i].double() - target) ** 2).mean().item())
    assert len(errors) == 24
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruct_undoes_the_normalisation_with_each_patchs_own_statistics(norm_pix_loss):
    model = MaskedAutoencoder(**SMALL, norm_pix_loss=norm_pix_loss)
    images = torch.randn(2, 3, 32, 32) * 5 + 3
    patches = patchify(images, 8)
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    target = (patches - mean) / std if norm_pix_loss else patches
    mask = (torch.arange(16) % 3 > 0).float().expand(2, 16)
    model.forward = lambda *_: (None, target, mask)  # a perfect prediction
    masked, filled = model.reconstruct(images)
    assert torch.allclose(filled, images, atol=1e-4)
    hidden = unpatchify(mask[..., None].expand(-1, -1, 192), 8, (4, 4))
    assert torch.equal(masked, images * (1 - hidden))


def test_reconstruct_keeps_the_visible_patches():
    model = MaskedAutoencoder(**SMALL)
    images, noise = torch.randn(1, 3, 32, 32), torch.arange(16.0)[None]
    masked, filled = model.reconstruct(images, 0.75, noise)
    assert torch.equal(filled[..., :8, :], images[..., :8, :])  # the first row of patches has the lowest noise
    assert (masked[..., 8:, :] == 0).all()
    assert not torch.equal(filled[..., 8:, :], images[..., 8:, :])


# ---------------------------------------------------------------------------------------------------------------------
# Other input sizes and precisions


def test_inputs_need_not_be_square():
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**SMALL, "img_size": (24, 40)})
    images = torch.randn(2, 3, 24, 40)
    loss, pred, mask = model(images)
    assert torch.isfinite(loss)
    assert pred.shape == (2, 15, 192)
    assert mask.sum() == 2 * 12
    assert [x.shape for x in model.reconstruct(images)] == [images.shape] * 2


def test_weights_move_to_a_non_square_input_by_interpolating_positions():
    square, wide = spread(MaskedAutoencoder(**SMALL)), MAESegmenter(**{**SMALL, "img_size": (40, 64)})
    report = load_pretrained(wide, square.state_dict())
    assert report.interpolated == ["pos_embed", "decoder_pos_embed"]
    assert torch.equal(wide.pos_embed.detach(), interpolate_pos_embed(square.pos_embed.detach(), (4, 4), (5, 8)))
    assert wide(torch.randn(1, 3, 40, 64)).shape == (1, 3, 40, 64)


@pytest.mark.parametrize("size", [30, (32, 20), 0])
def test_an_input_that_the_patch_does_not_divide_is_refused(size):
    with pytest.raises(ValueError, match="not divisible by patch_size 8"):
        MaskedAutoencoder(**{**SMALL, "img_size": size})


@pytest.mark.parametrize("build", [MaskedAutoencoder, MAESegmenter])
def test_bfloat16_autocast_trains_close_to_float32(build):
    torch.manual_seed(0)
    model, images = build(**SMALL), torch.randn(4, 3, 32, 32)
    noise = torch.rand(4, 16)

    def run(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = (
                model(images, 0.75, noise)[0] if build is MaskedAutoencoder else model(images).float().square().mean()
            )
        loss.backward()
        return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    (exact, gradients), (rounded, coarse) = run(False), run(True)
    assert rounded.dtype == torch.float32
    assert abs(rounded - exact) <= 0.02 * abs(exact)
    assert gradients.keys() == coarse.keys()
    assert all(torch.isfinite(g).all() for g in coarse.values())
    assert relative_error(coarse["blocks.0.mlp.fc1.weight"], gradients["blocks.0.mlp.fc1.weight"]) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The file itself


def test_models_work_when_the_file_is_copied_alone(tmp_path):
    import shutil
    import subprocess
    import sys

    import models

    shutil.copy(models.__file__, tmp_path)
    code = "import sys, models, torch; models.build_mae('mae_tiny', img_size=32)(torch.zeros(1, 3, 32, 32)); "
    code += "print('torchvision' in sys.modules, 'engine' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_without_masks_every_trainable_parameter_still_has_a_gradient():
    model = build_mae("mae_tiny", img_size=32)
    model(torch.randn(2, 3, 32, 32), mask_ratio=0)[0].backward()  # else several processes would wait for each other
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_autoencoder_may_predict_other_channels_than_it_reads():
    model = MaskedAutoencoder(**SMALL, out_chans=5)
    assert model.decoder_pred.out_features == 8 * 8 * 5
    assert model.forward_decoder(encode(model, torch.randn(1, 3, 32, 32))).shape == (1, 16, 8 * 8 * 5)


def test_an_autoencoder_has_no_buffers_that_processes_would_broadcast_at_every_step():
    assert list(MaskedAutoencoder(**SMALL).buffers()) == []


@pytest.mark.parametrize("decoder_depth", [0, 1, 3])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.75])
def test_the_loss_alone_equals_the_loss_beside_prediction_and_mask_with_all_gradients(decoder_depth, mask_ratio):
    sizes = {**SMALL, "decoder_depth": decoder_depth}
    model = spread(MaskedAutoencoder(**sizes)).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(3, 16, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]

    loss, _, _ = model(images, mask_ratio, noise)
    expected = torch.autograd.grad(loss, trained, allow_unused=True)
    alone = model(images, mask_ratio, noise, loss_only=True)
    found = torch.autograd.grad(alone, trained, allow_unused=True)

    assert abs(alone.item() - loss.item()) <= 1e-14
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_last_block_spares_the_visible_tokens_when_the_loss_is_asked_alone():
    from torch.utils.flop_counter import FlopCounterMode

    model = MaskedAutoencoder(**SMALL)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    counts = []
    for loss_only in (False, True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, 0.75, noise, loss_only=loss_only)
        counts.append(counter.get_total_flops())
    spared, dim = 5, 16
    products = 2 * spared * (dim * dim + dim * dim + 8 * dim * dim)  # queries, projection, MLP
    prediction = 2 * 4 * dim * 8 * 8 * 3  # of the visible patches; the class token's was never made
    assert counts[0] - counts[1] == 2 * (products + prediction)  # torch does not count attention on a CPU
