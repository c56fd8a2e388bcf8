"""Block masks hide what is asked, as a loop over images would; tokenisers name patches as a loop over codes would."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import MemoryStore

from augment import crop_resize, normalise
from batches import ALONE, Augmentation, Examples, TrainBatches
from objectives.masks import LEAST_BLOCK, TRIES, block_masks, block_sizes, count_hidden, exactly, halves, hidden_patches
from objectives.tokenizers import (
    TOKENIZERS,
    Sample,
    Tokenizer,
    nearest_codes,
    shrink_factor,
    spherical_kmeans,
    training_views,
)

QUICK = settings(deadline=None, database=None, max_examples=40)
GRIDS = st.tuples(st.integers(2, 16), st.integers(2, 16))


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- Masks --------------------------------------------------------------------------------------------------------------


@QUICK
@given(GRIDS, st.floats(0.05, 0.95), st.sampled_from([None, 0.2, 75 / 196]), st.integers(0, 2**31))
def test_exactly_the_wanted_number_of_patches_is_hidden_whatever_the_grid(grid, share, largest_block, seed):
    patches = grid[0] * grid[1]
    hidden = min(max(1, round(share * patches)), patches - 1)
    masks = block_masks(rng_of(seed), 7, grid, hidden, largest_block)
    assert masks.shape == (7, patches)
    assert (masks.sum(1) == hidden).all()
    ids = hidden_patches(grid, hidden, largest_block)(rng_of(seed), 7)
    assert ids.dtype == np.int64
    for row, mask in zip(ids, masks, strict=True):
        assert row.tolist() == np.flatnonzero(mask).tolist()


def slow_blocks(draws: np.ndarray, grid: tuple[int, int], hidden: int, most: float) -> np.ndarray:
    """Lay blocks over one image, patch by patch, from its own draws [TRIES, 4]."""
    rows, columns = grid
    mask = np.zeros(grid, bool)
    for area_draw, aspect_draw, top_draw, left_draw in draws:
        allowed = min(hidden - mask.sum(), most)
        if hidden == mask.sum():
            break
        size = block_sizes(area_draw, aspect_draw, LEAST_BLOCK * rows * columns, allowed)
        height, width = (int(side) for side in size)
        if not (0 < height < rows and 0 < width < columns):
            continue
        top = math.floor(top_draw * (rows - height + 1))
        left = math.floor(left_draw * (columns - width + 1))
        block = [(top + row, left + column) for row in range(height) for column in range(width)]
        news = [place for place in block if not mask[place]]
        if 0 < len(news) <= allowed:
            for place in news:
                mask[place] = True
    return mask.flatten()


@QUICK
@given(GRIDS, st.floats(0.1, 0.9), st.sampled_from([None, 75 / 196]), st.integers(0, 2**31))
def test_masks_of_a_batch_are_those_of_a_loop_over_images_and_blocks(grid, share, largest_block, seed):
    patches = grid[0] * grid[1]
    hidden = min(max(1, round(share * patches)), patches - 1)
    most = hidden if largest_block is None else largest_block * patches
    draws = rng_of(seed).random((TRIES, 4, 5))
    masks = block_masks(rng_of(seed), 5, grid, hidden, largest_block)
    for number, mask in enumerate(masks):
        of_blocks = slow_blocks(draws[:, :, number], grid, hidden, most)
        assert of_blocks.sum() <= hidden
        assert mask[of_blocks].all()  # what is missing is filled up, nothing is taken away


@pytest.mark.parametrize(("hidden", "largest_block"), [(75, None), (98, 75 / 196)])
def test_at_the_papers_size_blocks_alone_hide_nearly_all_that_is_asked(hidden, largest_block):
    most = hidden if largest_block is None else 75
    draws = rng_of(0).random((TRIES, 4, 200))
    found = [slow_blocks(draws[:, :, number], (14, 14), hidden, most).sum() for number in range(200)]
    assert hidden - 0.5 < np.mean(found) <= hidden
    masks = block_masks(rng_of(0), 200, (14, 14), hidden, largest_block).reshape(200, 14, 14)
    beside = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, :-1].sum()
    assert beside > 1.5 * hidden / 196  # hidden patches have hidden neighbours, unlike those hidden one by one
    assert masks.mean(0).min() > 0  # no place is always visible


@QUICK
@given(st.integers(1, 30), st.integers(0, 2**31), st.data())
def test_what_blocks_miss_is_added_at_random_and_what_they_exceed_is_shown_again(patches, seed, data):
    hidden = data.draw(st.integers(0, patches))
    masks = rng_of(seed).random((6, patches)) < 0.4
    fixed = exactly(masks, hidden, rng_of(seed + 1).random((6, patches)))
    assert (fixed.sum(1) == hidden).all()
    for before, after in zip(masks, fixed, strict=True):
        assert not (before & ~after).any() or not (after & ~before).any()


@QUICK
@given(GRIDS, st.integers(0, 2**31))
def test_halves_are_disjoint_equal_and_all_patches_together(grid, seed):
    patches = grid[0] * grid[1]
    if patches % 2:
        with pytest.raises(ValueError, match="cannot be split into two equal halves"):
            halves(grid)
        return
    split = halves(grid, 75 / 196)(rng_of(seed), 6)
    one, other = np.split(split, 2, axis=1)
    covered = block_masks(rng_of(seed), 6, grid, patches // 2, 75 / 196)
    for row, first, second, mask in zip(split, one, other, covered, strict=True):
        assert sorted(row) == list(range(patches))
        assert first.tolist() == np.flatnonzero(mask).tolist()
        assert second.tolist() == np.flatnonzero(~mask).tolist()


def test_a_mask_ratio_that_hides_nothing_or_everything_is_refused():
    assert count_hidden(196, 0.383) == 75
    for ratio in (0.001, 1.0):
        with pytest.raises(ValueError, match=r"hides .* of 196 patches; choose one that hides 1 to 195"):
            count_hidden(196, ratio)


# -- Tokens -------------------------------------------------------------------------------------------------------------


def photos(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Make smooth coloured noise, normalised as the network takes it [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    fine = torch.rand(count, 3, size, size, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return normalise(255 * (0.8 * smooth + 0.2 * fine))


def fitted(kind: str, patch_size: int, vocabulary: int = 12) -> Tokenizer:
    """Make a tokeniser from patches of noise."""
    tokenizer = Tokenizer(kind, vocabulary, patch_size)
    tokenizer.fit(tokenizer.patches(photos(vocabulary, 2 * patch_size, seed=1)))
    return tokenizer


def slow_token(image: np.ndarray, row: int, column: int, tokenizer: Tokenizer, patch_size: int) -> int:
    """Name a patch of an image [3, H, W] by a loop over codes; patches above 8 pixels are averaged down to 8."""
    patch = image[:, row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size]
    side = {4: 4, 8: 8, 14: 7, 16: 8}[patch_size]
    step = patch_size // side
    pixels = []
    for y in range(side):
        for x in range(side):
            pixels.append(patch[:, y * step : (y + 1) * step, x * step : (x + 1) * step].mean((1, 2)))
    vector = np.array(pixels)  # [side * side, 3]
    if tokenizer.kind == "random_projection":
        vector = vector - vector.mean(0)
    vector = vector.flatten()
    cosines = []
    for code in tokenizer.codes.double().numpy():
        cosines.append(code @ vector / np.linalg.norm(vector))
    return int(np.argmax(cosines))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("patch_size", [4, 8, 14, 16])
def test_tokens_are_those_of_a_loop_over_patches_and_codes(kind, patch_size):
    tokenizer = fitted(kind, patch_size)
    images = photos(3, 3 * patch_size)
    tokens = tokenizer(images)
    assert tokens.dtype == torch.int64
    for image, row_of_tokens in zip(images.double().numpy(), tokens, strict=True):
        slow = [slow_token(image, place // 3, place % 3, tokenizer, patch_size) for place in range(9)]
        assert row_of_tokens.tolist() == slow
    ids = torch.tensor([[3, 0], [8, 7], [1, 1]])
    assert torch.equal(tokenizer(images, ids), tokens.gather(1, ids))
    assert torch.allclose(tokenizer.codes.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize(
    ("patch_size", "factor"), [(1, 1), (4, 1), (8, 1), (9, 3), (14, 2), (16, 2), (32, 4), (13, 13)]
)
def test_patches_are_averaged_down_to_at_most_eight_pixels(patch_size, factor):
    assert shrink_factor(patch_size) == factor


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_stay_in_single_precision_under_autocast(kind):
    tokenizer = fitted(kind, 8, vocabulary=64)
    images = photos(4, 32)
    expected = tokenizer(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer(images), expected)


def test_tokens_of_a_flipped_crop_are_those_of_the_flipped_image():
    tokenizer = fitted("random_patches", 8, vocabulary=64)
    pixels = (255 * torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))).byte()
    boxes = torch.tensor([[2.0, 3.0, 30.0, 30.0], [0.0, 10.0, 25.0, 28.0]])
    flips = torch.tensor([[True, False], [True, False]])
    flipped = normalise(crop_resize(pixels, boxes, flips, 32))
    plain = normalise(crop_resize(pixels, boxes, torch.zeros_like(flips), 32))
    assert torch.equal(tokenizer(flipped), tokenizer(plain.flip(-1)))
    assert not torch.equal(tokenizer(flipped), tokenizer(plain))


@QUICK
@given(st.floats(0.05, 20), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_a_random_projection_sees_neither_contrast_nor_mean_colour(contrast, colour):
    tokenizer = Tokenizer("random_projection", 32, 8)
    images = photos(2, 32)
    changed = contrast * images + torch.tensor(colour)[:, None, None]
    different = tokenizer(images) != tokenizer(changed)
    assert different.sum() <= 1  # a patch between two codes may fall to either by rounding


def test_flat_patches_have_one_token_whatever_their_noise():
    tokenizer = Tokenizer("random_projection", 32, 4)
    flat = torch.full((2, 3, 8, 8), 0.7) + 1e-5 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not tokenizer(flat).any()
    assert tokenizer(flat + photos(2, 8)).any()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_seed_gives_one_tokeniser_and_another_seed_another(kind):
    def make(seed: int, batch_size: int = 4) -> Tokenizer:
        pixels = (255 * torch.rand(9, 3, 24, 24, generator=torch.Generator().manual_seed(0))).byte()
        examples = Examples(MemoryStore(pixels))
        batches = TrainBatches(examples, Augmentation(16), batch_size=batch_size, seed=seed)
        tokenizer = Tokenizer(kind, 20, 4, seed)
        views = training_views(tokenizer, batches, 16, Place())
        assert views.shape == ({"kmeans": 80}.get(kind, 20), 16, 48)
        tokenizer.fit(views)
        return tokenizer

    first, again, smaller_batch, other = make(0), make(0), make(0, 2), make(1)
    for same in (again, smaller_batch):
        assert torch.equal(first.codes, same.codes)
        assert torch.equal(first.counts, same.counts)
    assert not torch.equal(first.codes, other.codes)


class Place:
    """Where a tokeniser is fitted: one quiet process."""

    device = ALONE.device
    world_size = 1
    is_main = False


def test_random_patches_are_patches_of_different_views_and_name_themselves():
    tokenizer = Tokenizer("random_patches", 10, 8)
    views = tokenizer.patches(photos(10, 16))
    tokenizer.fit(views)
    assert tokenizer.name_patches(views[:, 0]).tolist() == list(range(10))
    assert tokenizer.counts.sum() == 40


@QUICK
@given(st.sampled_from(TOKENIZERS), st.integers(2, 600), st.integers(1, 900), st.integers(1, 256))
def test_enough_patches_are_looked_at_however_few_images_there_are(kind, vocabulary, images, patches):
    sample = Sample.of(Tokenizer(kind, vocabulary, 1), images, patches)
    wanted = vocabulary * (64 if kind == "kmeans" else 16)
    assert sample.views >= min(vocabulary, images)
    assert sample.patches <= patches
    assert sample.views * sample.patches >= min(wanted, max(vocabulary, 4096 * patches))
    if images >= vocabulary and vocabulary * patches >= wanted:
        assert sample.views == vocabulary


def test_tokens_of_few_images_are_counted_on_more_patches_than_their_codes():
    sample = Sample.of(Tokenizer("random_patches", 8192, 16), images=64, patches=16)
    assert sample.views * sample.patches == 8 * 8192


def slow_kmeans(patches: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Do one step of spherical k-means patch by patch."""
    sums = np.zeros_like(codes)
    for patch in patches:
        sums[np.argmax(codes @ patch)] += patch
    moved = codes.copy()
    for number, total in enumerate(sums):
        if np.linalg.norm(total) > 0:
            moved[number] = total / np.linalg.norm(total)
    return moved


def test_kmeans_is_that_of_a_loop_and_brings_patches_nearer_to_their_codes_each_time():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(200, 12, generator=generator)
    codes = torch.nn.functional.normalize(torch.randn(9, 12, generator=generator), dim=1)
    codes[8] = -torch.nn.functional.normalize(patches.sum(0), dim=0)  # far from all
    units = torch.nn.functional.normalize(patches, dim=1)
    slow = codes.double().numpy()
    nearness = []
    for iterations in range(1, 6):
        slow = slow_kmeans(units.double().numpy(), slow)
        found = spherical_kmeans(patches, codes, iterations)
        np.testing.assert_allclose(found.numpy(), slow, atol=1e-5)
        nearness.append((units @ found.T).max(1).values.mean().item())
    assert nearness == sorted(nearness)
    assert len(set(nearest_codes(patches, found).tolist())) > 1


def test_a_code_that_names_no_patch_stays_where_it_is():
    patches = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert torch.equal(spherical_kmeans(patches, codes)[1], codes[1])


@QUICK
@given(st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any))
def test_statistics_are_those_of_their_definitions(counts):
    tokenizer = Tokenizer("kmeans", len(counts), 4)
    tokenizer.counts = torch.tensor(counts)
    shares = [count / sum(counts) for count in counts if count]
    found = tokenizer.statistics()
    assert found["perplexity"] == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert found["top_share"] == pytest.approx(max(shares))
    assert found["used"] == len(shares)
    smoothed = [(count + 1) / (sum(counts) + len(counts)) for count in counts]
    assert tokenizer.unigram().exp().tolist() == pytest.approx(smoothed)


def test_without_its_mean_colour_removed_a_random_projection_would_give_most_patches_one_token():
    images = 0.2 * photos(20, 32) + 2  # bright, like sky
    centred = Tokenizer("random_projection", 256, 4)
    raw = Tokenizer("random_projection", 256, 4)
    raw.kind = "as the pixels are"
    for tokenizer in (centred, raw):
        tokens = tokenizer(images).flatten()
        tokenizer.counts = torch.bincount(tokens, minlength=256)
    assert centred.statistics()["perplexity"] > 5 * raw.statistics()["perplexity"]
    assert raw.statistics()["top_share"] > 0.5
