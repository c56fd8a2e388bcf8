"""Batches: pure functions of (seed, epoch, position), whatever the processes, the micro-batches and the starting step."""

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import MemoryStore

import augment
import data
from batches import Alone, Augmentation, EvalBatches, Examples, TrainBatches, uniform
from colours import Colours

QUIET = settings(deadline=None, database=None, max_examples=25)
COUNT, SIZE = 23, 12


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """23 pets; pixel values tell which image it is, and the trimap's class is the number modulo 3."""
    root = tmp_path_factory.mktemp("pets")
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    keys = [f"oxford-iiit-pet/images/{i}.png" for i in range(COUNT)]
    for i, key in enumerate(keys):
        Image.new("RGB", (20 + i, 30), (10 * i, 10 * i, 10 * i)).save(root / key)
        Image.new("L", (20 + i, 30), 1 + i % 3).save(root / data.trimap_path(key))
    made = []
    for kind in ("image", "trimap"):
        data.build_cache(root, keys, kind=kind, cache_dir=root / "cache", cache_size=SIZE)
        made.append(data.ImageStore(root, keys, kind=kind, cache_dir=root / "cache", cache_size=SIZE))
    return made


DRAWS = {"noise": uniform(5), "drop": uniform(2, 3)}
PLACES = np.arange(COUNT, dtype=np.float32)[:, None]


def batches(stores, batch_size, seed=0, vertical_flip=False, draws=DRAWS, **options):
    """Make training batches of the stores, with a target that names the entry."""
    return TrainBatches(
        Examples(*stores, targets={"place": PLACES}),
        Augmentation(8, vertical_flip=vertical_flip),
        batch_size=batch_size,
        seed=seed,
        draws=draws,
        **options,
    )


def process(rank: int, world_size: int) -> Alone:
    return Alone(rank=rank, world_size=world_size)


def numbers(batch) -> list[int]:
    """Which images a batch holds, read back from its pixels."""
    return (augment.denormalise(batch["images"])[:, 0].mean((1, 2)) / 10).round().int().tolist()


def joined(micro_batches: list[dict]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([m[k] for m in micro_batches]) for k in micro_batches[0]}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@QUIET
@given(batch_size=st.integers(1, COUNT), seed=st.integers(0, 2**63))
def test_an_epoch_holds_no_entry_twice_and_leaves_out_only_its_incomplete_last_batch(stores, batch_size, seed):
    train = batches(stores, batch_size, seed)
    steps = train.steps_per_epoch
    assert steps == COUNT // batch_size
    epochs = [[n for b in train.run(e * steps, (e + 1) * steps) for n in numbers(b[0])] for e in (0, 1)]
    for seen in epochs:
        assert len(seen) == len(set(seen)) == COUNT - COUNT % batch_size
    assert epochs[0] != epochs[1]


@QUIET
@given(
    world=st.integers(1, 4),
    micro=st.integers(1, 4),
    parts=st.integers(1, 3),
    seed=st.integers(0, 9),
    step=st.integers(0, 20),
)
def test_ranks_and_micro_batches_hold_disjoint_parts_of_the_same_global_batch(stores, world, micro, parts, seed, step):
    batch_size = world * micro * parts
    assume(batch_size <= COUNT)
    whole = joined(next(batches(stores, batch_size, seed, vertical_flip=True).run(step, step + 1)))
    shards = []
    for rank in range(world):
        options = dict(dist=process(rank, world), micro_batch_size=micro, vertical_flip=True)
        train = batches(stores, batch_size, seed, **options)
        (batch,) = train.run(step, step + 1)
        assert len(batch) == train.micro_batches == parts and all(len(m["images"]) == micro for m in batch)
        shards += batch
    assert equal(joined(shards), whole)
    assert len(set(numbers(whole))) == batch_size


@pytest.mark.parametrize("first", [0, 1, 4, 7])
def test_a_run_that_starts_anywhere_continues_the_same_experiment(stores, first):
    through = list(batches(stores, 5).run(0, 10))
    late = list(batches(stores, 5).run(first, 10))
    assert len(late) == 10 - first
    assert all(equal(joined(a), joined(b)) for a, b in zip(through[first:], late, strict=True))


def test_shapes_ranges_and_masks_belong_to_the_images(stores):
    for batch in batches(stores, 11, vertical_flip=True).run(0, 4):
        (b,) = batch
        assert b["images"].shape == (11, 3, 8, 8) and b["images"].dtype == torch.float32
        assert b["masks"].shape == (11, 8, 8) and b["masks"].dtype == torch.int64
        assert b["masks"].flatten(1).min(1)[0].tolist() == [n % 3 for n in numbers(b)]
        assert b["place"][:, 0].tolist() == numbers(b)
        assert b["noise"].shape == (11, 5) and b["drop"].shape == (11, 2, 3)
        assert b["noise"].min() >= 0 and b["noise"].max() < 1


def test_seeds_epochs_and_draws_are_independent(stores):
    noise = [
        joined(next(batches(stores, 5, seed).run(step, step + 1)))["noise"] for seed in (0, 1) for step in (0, 1, 4)
    ]
    assert len({x.numpy().tobytes() for x in noise}) == 6
    fewer = joined(next(batches(stores, 5, draws={}).run(0, 1)))  # a draw more or less changes nothing else
    more = joined(next(batches(stores, 5).run(0, 1)))
    assert torch.equal(fewer["images"], more["images"]) and "noise" not in fewer


def test_a_store_kept_on_the_device_gives_the_same_batches(stores):
    kept = []
    for store in stores:
        twin = object.__new__(data.ImageStore)
        twin.__dict__ |= store.__dict__ | {"tensor": store.gather(np.arange(COUNT))}
        kept.append(twin)
    for a, b in zip(batches(stores, 5).run(0, 3), batches(kept, 5).run(0, 3), strict=True):
        assert equal(joined(a), joined(b))


# -- Views --------------------------------------------------------------------------------------------------------------

VIEWS = {
    "second": Augmentation(9, crop_scale=(0.3, 1.0), colours=Colours(solarise=0.5)),
    "small": Augmentation(6, crop_scale=(0.05, 0.3), vertical_flip=True),
}


class FewDraws:
    """A change of colours that shows its draws: every pixel becomes the first of them."""

    num_draws = 2

    def __call__(self, images, draws):
        return draws[:, 0].view(-1, 1, 1, 1).expand_as(images)


def global_batch(stores, step=0, **options) -> dict[str, torch.Tensor]:
    return joined(next(batches(stores, 12, vertical_flip=True, **options).run(step, step + 1)))


@pytest.fixture(scope="module")
def noisy():
    """Images on which every crop looks different."""
    pixels = torch.randint(0, 256, (COUNT, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [MemoryStore(pixels)]


@QUIET
@given(world=st.integers(1, 3), micro=st.integers(1, 2), step=st.integers(0, 9))
def test_views_of_ranks_and_micro_batches_are_parts_of_the_same_global_batch(noisy, world, micro, step):
    whole = global_batch(noisy, step, views=VIEWS)
    shards = []
    for rank in range(world):
        train = batches(noisy, 12, vertical_flip=True, views=VIEWS, dist=process(rank, world), micro_batch_size=micro)
        (batch,) = train.run(step, step + 1)
        shards += batch
    found = joined(shards)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.allclose(found[name].float(), tensor.float(), atol=1e-4), name
    assert whole["second"].shape == (12, 3, 9, 9)
    assert whole["small"].shape == (12, 3, 6, 6)


def test_one_more_view_changes_nothing_else(noisy):
    none = global_batch(noisy)
    one = global_batch(noisy, views={"small": VIEWS["small"]})
    both = global_batch(noisy, views=VIEWS)
    assert set(both) - set(one) == {"second"}
    assert set(one) - set(none) == {"small"}
    for name, tensor in none.items():
        assert torch.equal(tensor, one[name])
    for name, tensor in one.items():
        assert torch.equal(tensor, both[name])


def test_views_of_equal_augmentations_differ_from_each_other_from_the_images_and_from_step_to_step(noisy):
    same = Augmentation(8, vertical_flip=True)
    seen = []
    for step in (0, 1, 3):
        batch = global_batch(noisy, step, views={"one": same, "two": same})
        seen += [batch[name].numpy().tobytes() for name in ("images", "one", "two")]
    assert len(set(seen)) == len(seen)


def test_views_show_the_image_of_their_row_and_are_cut_where_their_boxes_say(stores, noisy):
    train = batches(noisy, 6, views={"small": VIEWS["small"]})
    host = train.prepare(2)
    batch = joined(next(train.run(2, 3)))
    boxes = torch.from_numpy(host.arrays["small_boxes"]) * noisy[0].size
    flips = torch.from_numpy(host.arrays["small_flips"])
    expected = augment.crop_resize(noisy[0].gather(host.index), boxes, flips, 6)
    assert torch.equal(batch["small"], augment.normalise(expected))
    shares = host.arrays["small_boxes"][:, 2] * host.arrays["small_boxes"][:, 3]
    assert shares.max() < 0.4
    flat = joined(next(batches(stores, 6, views={"small": VIEWS["small"]}).run(0, 1)))
    assert numbers({"images": flat["small"]}) == numbers(flat)


def test_colours_take_their_own_draws_and_leave_the_crops_alone(noisy):
    plain = {"view": Augmentation(8)}
    coloured = {"view": Augmentation(8, colours=FewDraws())}
    train = batches(noisy, 6, views=coloured)
    host = train.prepare(0)
    assert host.arrays["view_colours"].shape == (6, 2)
    for name, array in batches(noisy, 6, views=plain).prepare(0).arrays.items():
        assert np.array_equal(array, host.arrays[name]), name
    shown = augment.denormalise(joined(next(train.run(0, 1)))["view"])
    expected = 255 * torch.from_numpy(host.arrays["view_colours"][:, :1, None, None])
    assert torch.allclose(shown, expected.expand_as(shown), atol=1e-3)


def test_the_images_themselves_can_change_their_colours(noisy):
    train = TrainBatches(Examples(*noisy), Augmentation(8, colours=FewDraws()), batch_size=4, seed=0)
    host = train.prepare(0)
    (batch,) = next(train.run(0, 1))
    assert set(batch) == {"images"}
    assert torch.allclose(
        augment.denormalise(batch["images"])[:, 0, 0, 0],
        255 * torch.from_numpy(host.arrays["colours"][:, 0]),
        atol=1e-3,
    )


def test_pixels_are_gathered_once_for_all_views_and_a_store_on_the_device_gives_the_same(noisy, monkeypatch):
    kept = MemoryStore(noisy[0].pixels)
    kept.tensor = kept.pixels
    gathered = []
    gather = MemoryStore.gather

    def counted(store, index, pin=False):
        gathered.append(len(index))
        return gather(store, index, pin)

    monkeypatch.setattr(MemoryStore, "gather", counted)
    on_host = global_batch(noisy, views=VIEWS)
    assert set(gathered) == {12}
    before = len(gathered)
    train = batches(noisy, 12, views=VIEWS)
    train.pipeline.load(train.prepare(0))
    assert len(gathered) == before + 1
    assert equal(on_host, global_batch([kept], views=VIEWS))


@QUIET
@given(world=st.integers(1, 3), batch_size=st.integers(1, 30))
def test_evaluation_cuts_each_image_in_the_same_way_whatever_the_processes_and_batches(noisy, world, batch_size):

    def views_of(rank, world, batch_size, seed=7):
        options = {"img_size": 6, "batch_size": batch_size, "views": VIEWS, "seed": seed}
        return list(EvalBatches(*noisy, **options, dist=process(rank, world)))

    (whole,) = views_of(0, 1, COUNT)
    for rank in range(world):
        for part in views_of(rank, world, batch_size):
            for name in ("second", "small"):
                assert torch.allclose(part[name], whole[name][part["index"]], atol=1e-4)
    (other,) = views_of(0, 1, COUNT, seed=8)
    assert torch.equal(other["images"], whole["images"])
    assert not torch.equal(other["small"], whole["small"])


def test_crops_and_flips_can_be_switched_off(stores):
    left = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    left[..., : SIZE // 2] = 255
    half = MemoryStore(left.expand(4, -1, -1, -1))

    def seen(**options):
        train = TrainBatches(Examples(half), Augmentation(SIZE, **options), batch_size=4, seed=0)
        return augment.denormalise(torch.cat([b[0]["images"] for b in train.run(0, 8)])).round()

    plain = seen(crop_scale=None, horizontal_flip=False, vertical_flip=True)
    assert torch.equal(plain, left.float().expand_as(plain))
    mirrored = seen(crop_scale=None)
    share = (mirrored[:, 0, 0, 0] == 0).float().mean()
    assert 0.2 < share < 0.8 and torch.equal(mirrored[:, :, 0], mirrored[:, :, -1])
    assert not torch.equal(seen(), mirrored)


@QUIET
@given(world=st.integers(1, 5), batch_size=st.integers(1, 30), img_size=st.sampled_from([SIZE, 7]))
def test_evaluation_sees_every_image_exactly_once(stores, world, batch_size, img_size):
    seen = []
    for rank in range(world):
        loader = EvalBatches(
            stores[0],
            img_size=img_size,
            batch_size=batch_size,
            targets={"place": torch.from_numpy(PLACES)},
            dist=process(rank, world),
        )
        parts = list(loader)
        sizes = [len(part["index"]) for part in parts]
        assert len(parts) == len(loader) == math.ceil(sum(sizes) / batch_size)
        assert set(sizes[:-1]) <= {max(sizes)} and max(sizes) <= batch_size  # of one size, but for the last
        for part in parts:
            index = part["index"]
            assert part["images"].shape == (len(index), 3, img_size, img_size)
            assert numbers(part) == part["place"][:, 0].tolist() == index.tolist()
            seen += index.tolist()
    assert sorted(seen) == list(range(COUNT))


def test_evaluation_with_more_processes_than_images_leaves_some_without(stores):
    shares = []
    for rank in range(COUNT + 2):
        loader = EvalBatches(stores[0], img_size=6, batch_size=4, dist=process(rank, COUNT + 2))
        shares.append([batch["index"].tolist() for batch in loader])
    assert shares == [[[r]] for r in range(COUNT)] + [[], []]


@pytest.mark.parametrize(
    "batch_size, options, words",
    [
        (24, {}, "larger than the split's 23 images .*the nearest valid size is 23"),
        (24, {"dist": process(0, 2), "micro_batch_size": 4}, "the nearest valid size is 16"),
        (7, {"dist": process(0, 2)}, r"2 process\(es\)\); the nearest valid size is (6|8)"),
        (10, {"micro_batch_size": 4}, r"micro-batch 4\); the nearest valid size is (8|12)"),
        (1, {"dist": process(0, 4)}, "the nearest valid size is 4"),
        (0, {}, "nearest valid size is 1"),
        (23, {"dist": process(0, 24)}, "is not divisible .* none: too few images"),
        (23, {"dist": process(0, 8)}, "the nearest valid size is 16"),
        (4, {"seed": -1}, "0 or more"),
    ],
)
def test_a_batch_that_cannot_be_names_the_nearest_valid_size(stores, batch_size, options, words):
    with pytest.raises(data.DataError, match=words):
        batches(stores, batch_size, **options)


def test_closing_stops_the_thread_and_its_errors_come_through(stores, monkeypatch):
    before = set(threading.enumerate())
    run = batches(stores, 5).run(0, 100)
    next(run)
    assert set(threading.enumerate()) - before
    run.close()
    assert not set(threading.enumerate()) - before

    def fail(*_):
        raise OSError("the disk went away")

    monkeypatch.setattr(data.ImageStore, "gather", fail)
    with pytest.raises(OSError, match="went away"):
        list(batches(stores, 5).run(0, 3))
    assert not set(threading.enumerate()) - before
