"""Draw a demo data set: animals and things on textured grounds that stand in for COCO 2017 and Oxford-IIIT Pet photos.

`draw_coco` and `draw_pet` give one picture with its labels; every picture follows from (seed, stream, index). What is drawn
stands in `demo_figures.txt` (copy it along); here is how: a figure is a list of parts (layer, outline [n, 2] with y down,
colour [3]), rasterised supersampled by `render` and put on a ground by `paste`. Needs numpy and Pillow only;
`prepare.py demo` writes the files.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SS = 2  # supersampling per axis
SIZES = ((160, 214), (180, 220), (214, 160), (200, 200), (220, 172), (168, 168), (165, 220))  # height, width
GROUNDS = (  # of a meadow, a room and a cloth: colours of the background, of the floor
    ("6fa4d8486848 a8c4dc6c7a8c e0b8907a6a54 b8bcc0586454", "6a8c40 a89858 8c7454 c8b890 e0e0e0 587838"),
    ("d8ccb4b8a488 b8c4ccd8e0e4 c8a0888a5848 8a947c6a7460 e8e0d4c8b8a4", "a878486a4428 c8b8a0a08c70 7c747c585058"),
    ("a83c38d8b8a0 4c6890c8d4e0 8a6a48d8c4a0 d8d0c4a89c8c 5c5450908478 3c5c30a8b868", "808080"),
)  # fmt: skip
THING_COATS = "b83830e8dcc8 2c5c94e8e8e0 d8a030384048 4a7a50d8c8a0 8a6040c8a880 e8e4dc504840 58585cc0b8a8 8c4878e0c8d0"
ROWS = (Path(__file__).parent / "demo_figures.txt").read_text().replace("\n ", " ").split("\n")
ROWS = [row.partition("|")[::2] for row in ROWS if row and row[0] != "#"]
ANIMALS, BREEDS, THINGS = (
    {fields.split()[1]: fields.split()[2:] for fields, _ in ROWS if fields.split()[0] == kind}
    for kind in ("animal", "breed", "thing")
)
FIGURES = {fields.split()[1]: figure for fields, figure in ROWS}
CATEGORIES = [{"id": int(r[0]), "name": name, "supercategory": "animal"} for name, r in ANIMALS.items()]
CATEGORIES += [{"id": int(r[0]), "name": n.replace("_", " "), "supercategory": r[1]} for n, r in THINGS.items()]


def colours(text):
    """Read "rrggbb…" as colours [n, 3] in 0..1."""
    return np.array([int(text[i : i + 2], 16) for i in range(0, len(text), 2)], np.float32).reshape(-1, 3) / 255


def vary(rng, text):
    """Draw one word of `text` as colours [n, 3], a little lighter, darker or warmer each time."""
    return np.clip(colours(rng.choice(text.split())) * rng.uniform(0.85, 1.12) + rng.normal(0, 0.012, 3), 0.04, 0.98)


def outline(shape, v):
    """Turn a shape letter and its numbers into points [n, 2]."""
    if shape == "p":
        return np.reshape(v, (-1, 2))
    if shape == "e":
        t, angle = np.arange(40) * np.pi / 20, v[4] if len(v) > 4 else 0.0
        x, y, c, s = v[2] * np.cos(t), v[3] * np.sin(t), np.cos(angle), np.sin(angle)
        return np.stack([v[0] + c * x - s * y, v[1] + s * x + c * y], 1)
    p, t = np.reshape(v[:-2], (-1, 2)), np.linspace(0, 1, 14)[:, None]
    middle = 2 * p[1] - (p[0] + p[2]) / 2 if len(p) == 3 else (p[0] + p[1]) / 2
    line = (1 - t) ** 2 * p[0] + 2 * t * (1 - t) * middle + t**2 * p[-1]
    step = np.gradient(line, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], 1) / np.linalg.norm(step, axis=1, keepdims=True).clip(1e-9)
    half = (v[-2] + (v[-1] - v[-2]) * t) * np.sqrt(np.clip(1 - (2 * t - 1) ** 12, 0.02, 1)) * normal  # round ends
    return np.concatenate([line + half, (line - half)[::-1]])


def figure(text, palette, at=(0, 0)):
    """Read a figure, moved by `at`: a list of (layer, points [n, 2], colour [3]); palette: letter -> colour."""
    parts = []
    for part in filter(None, (part.split() for part in text.split(";"))):
        layer, shape, *numbers, name = part
        rgb = palette[name[0]] * float(name[1:] or 1) if name[0] in palette else colours(name)[0]
        points = outline(shape, np.array(numbers, float))
        parts += [(layer[0], points * (side, 1) + at, rgb) for side in ((1, -1) if layer[1:] else (1,))]
    return parts


def quadruped(rng, name, palette):
    """Build an animal seen from the side, facing right: a list of parts."""
    body, leg, neck, angle, head, snout, width = (float(v) for v in ANIMALS[name][1:8])
    (ear, tail, pattern), angle, floor = ANIMALS[name][8:11], angle + rng.uniform(-0.25, 0.15), body * 0.3 + leg
    x, y = 0.38 + (neck + head * 0.6) * np.cos(angle), -body * 0.18 - (neck + head * 0.6) * np.sin(angle)  # the head
    nose = np.array([x + head * 0.5 + snout, y + head * 0.35 + snout * 0.45])
    sizes = dict(x=x, y=y, head=head, nx=nose[0], ny=nose[1], half=body / 2, chest=body * 0.53, jaw=head * 0.8)
    sizes |= dict(throat=body * (0.36 if neck < 0.6 else 0.28), tip=head * 0.5, withers=-body * 0.3)
    face, steps = {**palette, "A": palette["B" if pattern == "wool" else "A"]}, rng.uniform(-0.11, 0.11, 4)
    thigh, foot = f"{width * 1.25} {width * 0.72}", zip((-0.3, 0.38, -0.38, 0.28), steps, (0.7, 0.7, 1, 1), strict=True)
    legs = [
        figure(f"c s {u} 0 {u + v * 0.3 - 0.02} {floor * 0.55} {u + v} {floor} {thigh} A{k}", face) for u, v, k in foot
    ]
    parts = legs[0] + legs[1] + figure(FIGURES[tail], palette, (-0.47, -body * 0.22))
    parts += figure(FIGURES["trunk"].format(**sizes), palette) + legs[2] + legs[3]
    parts += figure(FIGURES["mane" if tail == "hair" else "neck"].format(**sizes), palette)
    parts += figure(FIGURES["head"].format(**sizes), face)
    parts += figure(FIGURES[ear], face, (x - head * 0.35, y - head * 0.8))
    parts += figure(FIGURES["eye"], face, (x + head * 0.35, y - head * 0.2))
    return parts + ([] if ear == "huge" else figure(f"d e 0 0 {head * 0.24} {head * 0.2} 14100e", face, nose))


def sitting(rng, cat, pattern, coat):
    """Build a cat or dog from the front, sitting, its head turned a little: a list of parts."""
    palette = {"A": coat[0], "B": coat[1], "I": vary(rng, "c8b040 78a850 5c9cc8")[0]}
    palette["E"] = coat[1] if pattern == "mask" else coat[0] * 0.82
    palette["M"] = coat[1] if pattern in ("mask", "patch") else coat[0] * 1.1
    at, name = (rng.uniform(-0.12, 0.12), rng.uniform(-0.05, 0.1)), "cat" if cat else "dog"
    head, face = figure(FIGURES[name + "_ears"], palette, at), figure("c e 0 0 .5 .44 A", palette, at)
    parts = figure(FIGURES["pet_tail"] + ";" + FIGURES["pet_body"], palette) + (head + face if cat else face + head)
    return parts + figure(FIGURES[name + "_face"], palette, at)


@lru_cache(maxsize=1)
def textures(n=512):
    """Make noise tiles [n, n], mean 0 and deviation 1: "cloud" (many octaves), "fur" (streaks), "grain"."""
    rng, bicubic = np.random.default_rng(99), Image.Resampling.BICUBIC

    def layer(h, w):
        return np.asarray(Image.fromarray(rng.normal(size=(h, w)).astype(np.float32)).resize((n, n), bicubic))

    tiles = {"cloud": sum(layer(2**k, 2**k) * 0.55**k for k in range(3, 9)), "grain": layer(n, n)}
    tiles["fur"] = layer(n // 2, n // 8) * 0.7 + layer(n // 8, n // 2) * 0.3 + layer(n // 16, n // 16) * 0.5
    return {name: (tile - tile.mean()) / tile.std() for name, tile in tiles.items()}


def noise(rng, name, h, w):
    """Cut a random piece [h, w], turned and mirrored at random, out of a texture tile."""
    tile = textures()[name].T if rng.random() < 0.5 else textures()[name]
    y, x = rng.integers(0, tile.shape[0] - h), rng.integers(0, tile.shape[1] - w)
    return tile[y : y + h, x : x + w][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]


def blur(array, radius):
    """Blur an array [H, W] in 0..1 by a Gaussian."""
    return np.asarray(
        Image.fromarray(np.uint8(array * 255)).filter(ImageFilter.GaussianBlur(float(radius)))
    ) / np.float32(255)


def rgb_tuple(colour):
    return tuple(int(c) for c in np.clip(colour, 0, 1) * 255)


def markings(rng, pattern, h, w):
    """Draw where the second colour goes: weights [h, w, 1] in 0..1."""
    cloud, (y, x) = noise(rng, "cloud", h, w), np.mgrid[:h, :w] / max(h, w)
    cell = np.abs(np.sin(x * 34 + cloud) * np.sin(y * 34 + cloud * 1.3))
    weight = {"stripe": np.sin(x * 60 + cloud * 1.6) * 4, "patch": (cloud - 0.35) * 9, "net": (0.22 - cell) * 12,
              "spot": (cell - 0.6) * 9}.get(pattern, np.full((h, w), -1.0))  # fmt: skip
    return np.clip(weight + 0.5, 0, 1)[..., None]


def render(rng, parts, height, coat, pattern="plain", fur=1.0):
    """Rasterise a figure about `height` pixels high, mirrored and tilted at random: rgb [h, w, 3], alpha [h, w] in 0..1."""
    angle, side, stretch = rng.normal(0, 0.05), rng.choice([-1, 1]), rng.uniform(0.9, 1.12)
    turn = [[np.cos(angle) * side * stretch, np.sin(angle) * side * stretch], [-np.sin(angle), np.cos(angle)]]
    outlines = [points @ turn for _, points, _ in parts]
    low, high = np.min([p.min(0) for p in outlines], 0), np.max([p.max(0) for p in outlines], 0)
    scale = height / (high - low)[1]
    w, h = (min(int(x), 500) for x in np.ceil((high - low) * scale) + 6)
    base, mask = Image.new("RGB", (w * SS, h * SS), rgb_tuple(coat[0] * 0.6)), Image.new("L", (w * SS, h * SS))
    detail = Image.new("RGBA", base.size)
    paint, cut, dot = ImageDraw.Draw(base), ImageDraw.Draw(mask), ImageDraw.Draw(detail)
    for (layer, _, colour), points in zip(parts, outlines, strict=True):
        p = ((points - low) * scale + 3) * SS
        if layer == "c":  # tufts along the edge; dark below, lighter towards the light
            p = (p[:, None] + (np.roll(p, -1, 0) - p)[:, None] * np.array([[0], [0.33], [0.67]])).reshape(-1, 2)
            p, middle = p + rng.normal(0, fur * SS * (0.25 + height * 0.003), p.shape), p.mean(0)
            for size, tone in ((1, 0.74), (0.86, 0.93), (0.6, 1.1)):
                inner = middle + (p - middle) * size - (1 - size) * np.ptp(p, 0).min() * 0.2
                paint.polygon(inner.ravel().tolist(), fill=rgb_tuple(colour * tone))
        else:
            dot.polygon(p.ravel().tolist(), fill=(*rgb_tuple(colour), 255))
        cut.polygon(p.ravel().tolist(), fill=255)
    rgb = np.asarray(base.reduce(SS).filter(ImageFilter.GaussianBlur(float(0.3 + height * 0.008))), np.float32) / 255
    alpha, over = np.asarray(mask.reduce(SS), np.float32) / 255, np.asarray(detail.reduce(SS), np.float32) / 255
    if pattern not in ("plain", "wool", "mask"):
        weight = markings(rng, pattern, h, w)
        rgb = rgb * (1 - weight) + coat[1] * weight * rgb.mean(2, keepdims=True) / coat[0].mean()
    d = 3 + int(height * 0.03)
    soft = np.pad(blur(alpha, height * 0.06), d)
    light = 0.5 * (soft[2 * d :, 2 * d :] - soft[: -2 * d, : -2 * d])  # bright where the body bends to the upper left
    light += fur * (0.1 * noise(rng, "fur", h, w) + 0.05 * noise(rng, "grain", h, w))
    return np.clip(rgb * (1 + light[..., None]) * (1 - over[..., 3:]) + over[..., :3], 0, 1), alpha


def paste(canvas, rgb, alpha, x, y, shadow=0.45):
    """Put a figure's lower middle at (x, y) on canvas [H, W, 3], in place, with a soft shadow: its alpha [H, W]."""
    (h, w), full = alpha.shape, np.zeros(canvas.shape[:2], np.float32)
    top, left = int(y - h), int(x - w / 2)
    rows, columns = slice(max(top, 0), max(top + h, 0)), slice(max(left, 0), max(left + w, 0))
    part = full[rows, columns].shape
    own = slice(max(-top, 0), max(-top, 0) + part[0]), slice(max(-left, 0), max(-left, 0) + part[1])
    yy, xx = np.arange(full.shape[0])[:, None], np.arange(full.shape[1])[None, :]
    dark = np.exp(-(((yy - y + 2) / (h * 0.06 + 2)) ** 2)) * np.exp(-(((xx - x - w * 0.04) / (w * 0.45)) ** 4))
    canvas *= (1 - shadow * dark.astype(np.float32))[..., None]
    full[rows, columns] = alpha[own]
    canvas[rows, columns] += alpha[own][..., None] * (rgb[own] - canvas[rows, columns])
    return full


def ground(rng, h, w):
    """Draw a place [h, w, 3], meadow, room or cloth, and where its floor begins (share of the height)."""
    kind, y, x = rng.choice(3, p=[0.4, 0.35, 0.25]), np.linspace(0, 1, h)[:, None, None], np.linspace(0, 1, w)[:, None]
    (cloud, fur), horizon = (noise(rng, name, h, w)[..., None] for name in ("cloud", "fur")), rng.uniform(0.3, 0.58)
    near, (far, floor) = np.clip((y - horizon) / (1 - horizon), 0, 1), (vary(rng, text) for text in GROUNDS[kind])
    if kind == 0:
        hills = horizon - 0.05 + 0.07 * np.sin(x * rng.uniform(2, 9) + rng.uniform(0, 6)) + 0.02 * cloud
        back = np.where(y > hills, far[1] * (1 + 0.14 * cloud), far[0] + y * 0.4 + 0.06 * np.maximum(cloud, 0))
        front = floor[0] * (0.75 + 0.35 * near + 0.12 * fur * (0.3 + near) + 0.08 * cloud)
    elif kind == 1:
        bands = np.sin((x if rng.random() < 0.6 else y) * rng.uniform(20, 70)) > rng.choice([-0.6, 0, 0.6, 2])
        planks = np.sin((x - 0.5) / (0.3 + near) * rng.uniform(18, 34)) > rng.choice([0.93, 2, 0])
        back = np.where(bands, far[1], far[0]) * (1 + 0.04 * cloud) * (0.85 + 0.25 * (horizon - y))
        front = np.where(planks, floor[1], floor[0]) * (1 + 0.06 * fur) * (0.8 + 0.3 * near)
    else:  # folds, with the weave of cloth or soft like leaves out of focus
        fold = np.sin(x * rng.uniform(4, 24) + y * rng.uniform(4, 24) + cloud * rng.choice([0.4, 1.6]))
        back = front = far[0] + (far[1] - far[0]) * (0.5 + 0.3 * fold) + 0.05 * (fur if rng.random() < 0.6 else cloud)
    canvas = np.clip(np.where(y > horizon, front, back), 0, 1).astype(np.float32)
    for _ in range(rng.integers(0, 4)):  # cushions and stones in fur's own colours: colour alone tells no animal
        coat = vary(rng, " ".join([row[-1] for row in BREEDS.values()] + [THING_COATS]))
        cushion = figure(FIGURES[rng.choice(["stone", "bag", "cushion"])], dict(zip("AB", coat, strict=True)))
        drawn = render(rng, cushion, rng.uniform(0.15, 0.4) * h, coat, rng.choice(["plain", "stripe", "patch"]))
        paste(canvas, *drawn, rng.uniform(0, w), h * rng.uniform(horizon + 0.1, 1), 0.3)
    return canvas, horizon


def develop(rng, canvas):
    """Light a picture [H, W, 3] like a photo (direction, warmth, vignette, sensor noise): Pillow image."""
    h, w = canvas.shape[:2]
    x, y = np.linspace(-1, 1, w)[None, :], np.linspace(-1, 1, h)[:, None]
    light = 1 + rng.uniform(-0.14, 0.14) * x + rng.uniform(-0.12, 0.12) * y - rng.uniform(0, 0.16) * (x * x + y * y)
    light = light[..., None] * rng.uniform(0.85, 1.1) * rng.normal(1, 0.02, 3)
    canvas = canvas * light.astype(np.float32) + 0.006 * noise(rng, "grain", h, w)[..., None]
    return Image.fromarray(np.uint8(np.clip(canvas, 0, 1) * 255))


def draw_coco(seed, stream, index):
    """Draw one COCO-like photo: (Pillow image, [(category id, visible mask bool [H, W])]).

    Of 40 pictures 18 show animals (3 of them two kinds) and 22 none (2 of these nothing that has a label).
    """
    rng, slot = np.random.default_rng([seed, stream, index]), index * 7 % 40
    h, w = SIZES[rng.integers(len(SIZES))]
    canvas, horizon = ground(rng, h, w)
    kinds = rng.choice(list(ANIMALS), (slot < 18) + (slot < 3), replace=False)
    names = [kind for kind in kinds for _ in range(rng.choice([1, 1, 1, 2, 3]) if len(kinds) == 1 else 1)]
    things = rng.choice(list(THINGS), rng.integers(0, 3) if names else rng.integers(1, 4) if slot < 38 else 0)
    floors, labels = np.sort(rng.uniform(horizon + 0.12, 0.98, len(names) + len(things))), []
    for name, floor in zip(rng.permutation([*names, *things]), floors, strict=True):
        flies, near = name in ("kite", "clock"), h * (0.55 + 0.6 * (floor - horizon) / (1 - horizon))
        text = " ".join(ANIMALS[name][11:]) if name in ANIMALS else THING_COATS
        palette = dict(zip("AB", coat := vary(rng, text), strict=True))
        if name in THINGS:
            size = near * float(THINGS[name][2]) * rng.uniform(0.7, 1.1)
            drawn = render(rng, figure(FIGURES[name], palette), size, coat, fur=0.25)
        else:
            size = near * {"bird": 0.3, "giraffe": 0.75}.get(name, 0.5) * rng.uniform(0.8, 1.35)
            parts = figure(FIGURES["bird_body"], palette) if name == "bird" else quadruped(rng, name, palette)
            drawn = render(rng, parts, size, coat, ANIMALS[name][10], fur=1.6 if name == "sheep" else 1.0)
        height = h * (rng.uniform(0.35, 0.6) if flies else floor)
        alpha = paste(canvas, *drawn, w * rng.uniform(0.15, 0.85), height, 0 if flies else 0.45)
        labels = [(label, mask & (alpha < 0.5)) for label, mask in labels]
        labels.append((int({**ANIMALS, **THINGS}[name][0]), alpha >= 0.5))
    return develop(rng, canvas), [(label, mask) for label, mask in labels if mask.sum() >= 12]


def draw_pet(seed, index):
    """Draw one pet photo: (breed name, Pillow image, trimap uint8 [H, W]: 1 pet, 2 background, 3 a thin band between)."""
    rng, name = np.random.default_rng([seed, 3, index]), list(BREEDS)[index % len(BREEDS)]
    _, species, _, pattern, coats = BREEDS[name]
    h, w = SIZES[rng.integers(len(SIZES))]
    canvas, _ = ground(rng, h, w)
    coat, pose = vary(rng, coats), rng.choice(3, p=[0.4, 0.3, 0.3])  # close-up, sitting, standing
    size = h * (rng.uniform(1.15, 1.8), rng.uniform(0.65, 0.95), rng.uniform(0.45, 0.75))[pose]
    if pose == 2:
        parts = quadruped(rng, "cat" if species == "1" else "dog", dict(zip("AB", coat, strict=True)))
    else:
        parts = sitting(rng, species == "1", pattern, coat)
    drawn = render(rng, parts, size, coat, pattern)
    floor = size + h * rng.uniform(0.06, 0.24) if pose == 0 else h * rng.uniform(0.85, 0.99)
    soft = blur(paste(canvas, *drawn, w * rng.uniform(0.36, 0.64), floor), 2)
    return name, develop(rng, canvas), np.where(soft > 0.9, 1, np.where(soft > 0.1, 3, 2)).astype(np.uint8)


def describe(mask):
    """Give a mask bool [H, W] as COCO does: box, area and run lengths down the columns."""
    rows, columns, flat = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0)), mask.ravel(order="F")
    runs = np.diff([0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1), flat.size]).tolist()
    box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
    outline = {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}
    return {"bbox": [float(v) for v in box], "area": float(mask.sum()), "iscrowd": 0, "segmentation": outline}


def write_coco(folder, part, count, seed, stream, update):
    """Draw `count` photos into folder/part and their instances file; `update()` is called after each."""
    content = {"info": {"description": "drawn demo photos"}, "images": [], "annotations": [], "categories": CATEGORIES}
    (folder / part).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for index in range(count):
        (photo, labels), image = draw_coco(seed, stream, index), 1 + stream + index * 37
        name = f"{image:012d}.jpg"
        photo.save(folder / part / name, quality=90)
        content["images"].append({"id": image, "file_name": name, "width": photo.width, "height": photo.height})
        for label, mask in labels:
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, "image_id": image, "category_id": label, **describe(mask)})
        update()
    (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def write_pets(folder, count, seed, update):
    """Draw `count` pets into folder/images with trimaps and list.txt in the publisher's format."""
    trimaps, rows = folder / "annotations" / "trimaps", ["#Image CLASS-ID SPECIES BREED ID"]
    trimaps.mkdir(parents=True)
    (folder / "images").mkdir()
    for index in range(count):
        breed, photo, trimap = draw_pet(seed, index)
        name = f"{breed}_{index // len(BREEDS) + 1}"
        photo.save(folder / "images" / f"{name}.jpg", quality=90)
        Image.fromarray(trimap).save(trimaps / f"{name}.png")
        rows.append(" ".join([name, *BREEDS[breed][:3]]))
        update()
    (folder / "annotations" / "list.txt").write_text("\n".join(sorted(rows)) + "\n")
