"""Block masks of BEiT: rectangles of patches are hidden until a fixed number of them is, for all images of a batch at once.

    draw = hidden_patches((14, 14), hidden=75)     # BEiT: 75 of 196 patches
    ids = draw(rng, 256)                           # int64 [256, 75], in image order

As in Bao et al. 2021 (BEiT, section 2.3 and its code): the area of a block is uniform, its aspect ratio log-uniform, and
it must hide patches that no block hides yet. BEiT stops below the wanted number where no further block fits; here patches at
random fill it up, so that all shapes are static.
"""

import numpy as np

from batches import Draw

LEAST_BLOCK = 16 / 196  # share of all patches that the smallest block covers
LARGEST_ASPECT = 1 / 0.3  # of height to width or of width to height
TRIES = 40  # blocks that are tried for each image

Grid = tuple[int, int]  # rows and columns of patches


def count_hidden(patches: int, mask_ratio: float) -> int:
    """Count the patches that a mask ratio hides; ValueError unless it hides one and leaves one visible."""
    hidden = round(patches * mask_ratio)
    if not 0 < hidden < patches:
        problem = f"--mask_ratio {mask_ratio:g} hides {hidden} of {patches} patches"
        raise ValueError(f"{problem}; choose one that hides 1 to {patches - 1}")
    return hidden


def hidden_patches(grid: Grid, hidden: int, largest_block: float | None = None) -> Draw:
    """Make a draw of the hidden patches of each image -> int64 [images, hidden], in image order; see `block_masks`."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        masks = block_masks(rng, count, grid, hidden, largest_block)
        return np.nonzero(masks)[1].reshape(count, hidden)

    return draw


def halves(grid: Grid, largest_block: float | None = None) -> Draw:
    """Make a draw of two halves of the patches of each image -> int64 [images, L]: the half that blocks cover, the other.

    Each half is in image order. ValueError for a grid with an odd number of patches.
    """
    patches = grid[0] * grid[1]
    if patches % 2:
        problem = f"{grid[0]} x {grid[1]} patches cannot be split into two equal halves"
        raise ValueError(f"{problem}; choose another img_size")

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        covered = block_masks(rng, count, grid, patches // 2, largest_block)
        return np.argsort(~covered, axis=1, kind="stable")

    return draw


def block_masks(
    rng: np.random.Generator, count: int, grid: Grid, hidden: int, largest_block: float | None = None
) -> np.ndarray:
    """Hide `hidden` patches of each of `count` images by blocks -> bool [count, rows * columns], True where hidden.

    largest_block: share of all patches that a block covers at most; None: as many as are to be hidden.
    """
    rows, columns = grid
    patches = rows * columns
    most = hidden if largest_block is None else largest_block * patches
    masks = np.zeros((count, rows, columns), bool)
    draws = rng.random((TRIES, 4, count))
    for area_draw, aspect_draw, *corner_draws in draws:
        missing = hidden - masks.sum((1, 2))
        if not missing.any():
            break
        allowed = np.minimum(missing, most)
        sizes = block_sizes(area_draw, aspect_draw, LEAST_BLOCK * patches, allowed)
        blocks = place_blocks(grid, sizes, corner_draws)
        news = (blocks & ~masks).sum((1, 2))
        accepted = (news > 0) & (news <= allowed)
        masks |= blocks & accepted[:, None, None]
    return exactly(masks.reshape(count, patches), hidden, rng.random((count, patches)))


def block_sizes(
    area_draw: np.ndarray, aspect_draw: np.ndarray, least: float, most: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Turn uniform draws [count] into heights and widths of blocks [count], of `least` to `most` [count] patches."""
    area = least + (most - least) * area_draw
    aspect = np.exp(np.log(LARGEST_ASPECT) * (2 * aspect_draw - 1))
    heights = np.rint(np.sqrt(area * aspect))
    widths = np.rint(np.sqrt(area / aspect))
    return heights, widths


def place_blocks(grid: Grid, sizes: tuple[np.ndarray, np.ndarray], corner_draws: list[np.ndarray]) -> np.ndarray:
    """Place blocks of heights and widths [count] at random -> bool [count, rows, columns].

    What is as long as the grid or longer, or has no extent, covers nothing. corner_draws: two uniform draws [count].
    """
    covered = []
    for length, extent, draw in zip(grid, sizes, corner_draws, strict=True):
        fits = (extent > 0) & (extent < length)
        start = np.floor(draw * (length - extent + 1))
        from_start = np.arange(length) - start[:, None]
        is_covered = (from_start >= 0) & (from_start < extent[:, None])
        covered.append(is_covered & fits[:, None])
    in_rows, in_columns = covered
    return in_rows[:, :, None] & in_columns[:, None, :]


def exactly(masks: np.ndarray, hidden: int, noise: np.ndarray) -> np.ndarray:
    """Hide exactly `hidden` patches of each row of masks [count, L]: random ones are added, or shown again.

    noise [count, L] in [0, 1) decides which.
    """
    order = np.argsort(noise + ~masks, axis=1)  # hidden ones first, each part in random order
    fixed = np.zeros_like(masks)
    np.put_along_axis(fixed, order[:, :hidden], True, axis=1)
    return fixed
