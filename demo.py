"""Draw a demo data set: animals and things on textured grounds that stand in for COCO 2017 and Oxford-IIIT Pet photos.

`draw_coco` and `draw_pet` give one picture with its labels, which follows from (seed, stream, index). What is drawn
stands in `demo_figures.txt` (copy it along). Needs numpy and Pillow only; `prepare.py demo` writes the files.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

SIZES = ((160, 214), (180, 220), (214, 160), (200, 200), (220, 172), (168, 168), (165, 220))  # height, width
TABLES = {}  # kind -> name -> fields, the last one behind "|"
for row in Path(__file__).with_name("demo_figures.txt").read_text().replace("\n ", " ").splitlines():
    if row and row[0] != "#":
        fields, _, last = row.partition("|")
        TABLES.setdefault(fields.split()[0], {})[fields.split()[1]] = [*fields.split()[2:], last]
OBJECTS, BREEDS, FIGURES, GROUNDS = (TABLES[kind] for kind in ("object", "breed", "figure", "ground"))
THING_COATS = TABLES["coats"]["things"][:-1]
COATS = THING_COATS + [fields[4] for fields in BREEDS.values()]
CATEGORIES = [{"id": int(f[0]), "name": n.replace("_", " "), "supercategory": f[1]} for n, f in OBJECTS.items()]
NOISE = {"cloud": ((60, 60, 0.9), (24, 24, 0.7), (8, 8, 0.45)), "fur": ((2, 8, 1.2), (8, 3, 0.5), (16, 16, 1))}
PATTERNS = {  # of position and noise: how much of a coat's second colour shows, from 0 to 1
    "stripe": lambda x, y, cloud: np.sin(x * 61 + cloud) * 4 + 0.5,
    "patch": lambda x, y, cloud: (cloud - 0.3) * 9,
    "spot": lambda x, y, cloud: np.abs(np.sin(x * 34 + cloud) * np.sin(y * 34 + cloud)) * 9 - 4,
}


def noise(rng, name, h, w):
    """Draw smooth noise [h, w], mean 0 and deviation about 1: "cloud" (octaves) or "fur" (streaks)."""
    cells = [Image.fromarray(np.float32(rng.normal(0, v, (h // dy + 2, w // dx + 2)))) for dy, dx, v in NOISE[name]]
    return sum(np.asarray(cell.resize((w, h), Image.Resampling.BICUBIC)) for cell in cells)


def blur(array, radius):
    """Blur an array [H, W] or [H, W, 3] in 0..1 by a Gaussian."""
    return np.float32(Image.fromarray(np.uint8(array * 255)).filter(ImageFilter.GaussianBlur(float(radius)))) / 255


def vary(rng, coats):
    """Draw one of `coats` (rrggbb…) as colours [n, 3] in 0..1, a little lighter, darker or warmer each time."""
    colours = np.frombuffer(bytes.fromhex(rng.choice(coats)), np.uint8).reshape(-1, 3) / 255
    return np.float32(np.clip(colours * rng.uniform(0.85, 1.12) + rng.normal(0, 0.012, 3), 0.04, 0.98))


def read_figure(rng, figure, coat, pattern, lively):
    """Read a figure, if `lively` with legs and head moved: a list of (layer, outline [n, 2], colour [3] in 0..1)."""
    ears, muzzle = coat[1] if pattern == "mask" else coat[0] * 0.82, coat[int(pattern in ("mask", "patch"))]
    colours = {"A": coat[0], "B": coat[1], "E": ears, "M": muzzle, "I": vary(rng, ["c8b040", "78a850", "5c9cc8"])[0]}
    parts, nod, t = [], lively * rng.uniform(-0.3, 0.2), np.linspace(0, 1, 60)
    for layer, shape, *numbers, name in (part.split() for part in figure.split(";")):
        v = np.array(numbers, float)
        if shape == "p":
            z = v.view(complex)
        elif shape == "e":
            z = v[0] + v[2] * np.cos(2 * np.pi * t) + 1j * (v[1] + v[3] * np.sin(2 * np.pi * t))
        else:
            start, middle, end = v[:6].view(complex)
            line = start * (1 - t) * (1 - 2 * t) + middle * 4 * t * (1 - t) + end * t * (2 * t - 1)
            half = (v[6] + (v[7] - v[6]) * t) * np.sqrt(np.clip(1 - (2 * t - 1) ** 12, 0.02, 1))  # round ends
            side = 1j * half * np.exp(1j * np.angle(np.gradient(line)))
            z = np.concatenate([line + side, (line - side)[::-1]])
        stride = lively * rng.uniform(-0.35, 0.35)
        z = z + stride * np.clip(z.imag - 0.2, 0, 0.35) + 1j * nod * np.maximum(z.real - 0.3, 0)
        plain = name[0] not in colours
        colour = np.array(ImageColor.getrgb("#" + name)) / 255 if plain else colours[name[0]] * float(name[1:] or 1)
        parts += [(layer[0], np.stack([x, z.imag], 1), colour) for x in (z.real, -z.real)[: len(layer)]]
    return parts


def draw(rng, canvas, figure, coats, height, at, pattern="plain", fur=1.0, lively=False, shadow=0.45):
    """Draw a figure about `height` pixels high, its foot at `at` (x, y), on canvas [H, W, 3]: its alpha [H, W]."""
    coat, full = vary(rng, coats), np.zeros(canvas.shape[:2], np.float32)
    turn = np.diag([rng.choice([-1, 1]) * rng.uniform(0.9, 1.12), 1]) + rng.normal(0, 0.05, (2, 2))
    parts = [(layer, p @ turn, colour) for layer, p, colour in read_figure(rng, figure, coat, pattern, lively)]
    (x0, y0), (x1, y1) = (edge(np.concatenate([p for _, p, _ in parts]), 0).tolist() for edge in (np.min, np.max))
    scale, width, margin = height / (y1 - y0), height * (x1 - x0) / (y1 - y0), 5 + height * 0.15
    left, top = int(max(at[0] - width / 2 - margin, 0)), int(max(at[1] - height - margin, 0))
    box = slice(top, int(at[1] + margin)), slice(left, int(at[0] + width / 2 + margin))
    canvas, (h, w) = canvas[box], full[box].shape  # only the figure's surroundings
    images = [Image.new(mode, (2 * w, 2 * h), dark) for mode, dark in (("RGB", "#504844"), ("RGBA", 0), ("L", 0))]
    body, detail, outline = map(ImageDraw.Draw, images)  # at twice the size, to be smooth
    for layer, p, colour in parts:
        p = ((p - ((x0 + x1) / 2, y1)) * scale + at - (left, top)) * 2
        p += (layer == "c") * rng.normal(0, fur * (0.5 + height * 0.004), p.shape)  # tufts
        outline.polygon(p.ravel().tolist(), fill=255)
        for size, tone in ((1, 0.74), (0.86, 0.93), (0.6, 1.1)) if layer == "c" else ((1, 1),):  # lighter within
            inner = p.mean(0) + (p - p.mean(0)) * size - (1 - size) * np.ptp(p, 0).min() * 0.2
            ink = tuple(np.uint8(np.clip(colour * tone, 0, 1) * 255).tolist())
            (body if layer == "c" else detail).polygon(inner.ravel().tolist(), fill=ink)
    body, detail, alpha = (np.float32(image.reduce(2)) / 255 for image in images)
    body, y, x = blur(body, 0.3 + height * 0.008), np.float32(range(h))[:, None], np.float32(range(w))
    if pattern in PATTERNS:
        u, v = x / max(height, width), y / max(height, width)
        second = PATTERNS[pattern](u, v, noise(rng, "cloud", h, w)).clip(0, 1)[..., None]
        body += second * (coat[1] / coat[0].mean() * body.mean(2, keepdims=True) - body)
    light = (3 + height * 0.03) * np.add(*np.gradient(blur(alpha, height * 0.06)))  # from the upper left
    body = (body * (1 + light + fur * 0.11 * noise(rng, "fur", h, w))[..., None]).clip(0, 1)
    body += detail[..., 3:] * (detail[..., :3] - body)
    far = ((y + top - at[1] + 2) / (height * 0.06 + 2)) ** 2 + ((x + left - at[0]) / (width * 0.45)) ** 4
    canvas *= 1 - shadow * np.exp(-far)[..., None]
    canvas += alpha[..., None] * (body - canvas)
    full[box] = alpha
    return full


def ground(rng):
    """Draw a place [H, W, 3], meadow, room or cloth, and where its floor begins (share of the height)."""
    (h, w), horizon, style = rng.choice(SIZES).tolist(), rng.uniform(0.3, 0.58), rng.random()
    y, x, a, b = np.float32(range(h))[:, None] / h, np.float32(range(w)) / w, rng.uniform(4, 24), rng.uniform(4, 24)
    kind = rng.choice(list(GROUNDS), p=[0.4, 0.35, 0.25])
    cloud, fur, near = noise(rng, "cloud", h, w), noise(rng, "fur", h, w), np.clip((y - horizon) / (1 - horizon), 0, 1)
    far, floor = vary(rng, GROUNDS[kind][:-1]), vary(rng, GROUNDS[kind][-1].split())
    mix = 0.5 + 0.3 * np.sin(x * a + y * b + cloud)  # folds of a cloth, hills or a papered wall
    if kind == "meadow":
        mix = np.float32(y > horizon - 0.05 + 0.07 * np.sin(x * b / 2 + a) + 0.02 * cloud)
    elif kind == "room":
        mix = np.float32(np.sin((x if style < 0.6 else y) * 3 * b) > a / 12 - 1 + 0 * cloud)
    planks = np.sin((x - 0.5) / (0.3 + near) * (18 + a)) > (0.93 if style < 0.5 else 0)
    back = (far[0] + (far[1] - far[0]) * mix[..., None]) * (1 + 0.06 * cloud)[..., None]
    front = np.where(planks[..., None], floor[1], floor[0]) * (0.75 + 0.3 * near + 0.1 * fur * (0.4 + near))[..., None]
    canvas = np.where((y < horizon)[..., None] | (kind == "cloth"), back, front)
    for _ in range(rng.integers(0, 4)):  # cushions and stones in fur's own colours: colour alone tells no animal
        figure, pattern = FIGURES[rng.choice(["stone", "bag", "cushion"])][0], rng.choice(["plain", "stripe", "patch"])
        at, size = (rng.uniform(0, w), h * rng.uniform(horizon + 0.1, 1)), rng.uniform(0.15, 0.4) * h
        draw(rng, canvas, figure, COATS, size, at, pattern, shadow=0.3)
    return canvas, horizon


def develop(rng, canvas):
    """Light a picture [H, W, 3] like a photo (direction, warmth, vignette, sensor noise): Pillow image."""
    x, y = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in canvas.shape[1::-1]))
    light = 1 + rng.uniform(-0.14, 0.14) * x + rng.uniform(-0.12, 0.12) * y - rng.uniform(0, 0.16) * (x * x + y * y)
    canvas = canvas * light[..., None] * np.float32(rng.uniform(0.85, 1.1) * rng.normal(1, 0.02, 3))
    canvas += np.float32(rng.normal(0, 0.006, light.shape))[..., None]
    return Image.fromarray(np.uint8(canvas.clip(0, 1) * 255))


def draw_coco(seed, stream, index):
    """Draw one COCO-like photo: (Pillow image, [(category id, visible mask bool [H, W])]).

    Of 40 pictures 18 show animals (3 of them two kinds) and 22 none (2 of these nothing that has a label).
    """
    rng, slot, labels = np.random.default_rng([seed, stream, index]), index * 7 % 40, []
    canvas, horizon = ground(rng)
    h, w = canvas.shape[:2]
    animals, things = ([name for name, f in OBJECTS.items() if (f[1] == "animal") == kind] for kind in (True, False))
    kinds = rng.choice(animals, (slot < 18) + (slot < 3), replace=False)
    names = [kind for kind in kinds for _ in range(rng.choice([1, 1, 1, 2, 3]) if len(kinds) == 1 else 1)]
    names += [*rng.choice(things, rng.integers(0, 3) if names else rng.integers(1, 4) if slot < 38 else 0)]
    floors = sorted(rng.uniform(horizon + 0.12, 0.98) for _ in names)
    for name, floor in zip(rng.permutation(names), floors, strict=True):
        label, group, share, pattern, fur, *coats, figure = OBJECTS[name]
        flies, lively = name in ("kite", "clock"), group == "animal"
        size = float(share) * rng.uniform(0.75, 1.25) * h * (0.55 + 0.6 * (floor - horizon) / (1 - horizon))
        at, shadow = (w * rng.uniform(0.15, 0.85), h * (rng.uniform(0.35, 0.6) if flies else floor)), 0.45 * (not flies)
        alpha = draw(rng, canvas, figure, coats or THING_COATS, size, at, pattern, float(fur), lively, shadow)
        labels = [*((k, mask & (alpha < 0.5)) for k, mask in labels), (int(label), alpha >= 0.5)]
    return develop(rng, canvas), [(label, mask) for label, mask in labels if mask.sum() >= 12]


def draw_pet(seed, index):
    """Draw one pet photo: (breed name, Pillow image, trimap uint8 [H, W]: 1 pet, 2 background, 3 a thin band)."""
    rng, breed = np.random.default_rng([seed, 3, index]), list(BREEDS)[index % len(BREEDS)]
    _, species, _, pattern, coat, _ = BREEDS[breed]
    canvas, _ = ground(rng)
    (h, w, _), kind, pose = canvas.shape, "cat" if species == "1" else "dog", rng.choice(3, p=[0.4, 0.3, 0.3])
    size = h * rng.uniform(*((1.15, 1.8), (0.65, 0.95), (0.45, 0.75))[pose])  # close-up, sitting, standing
    at = w * rng.uniform(0.36, 0.64), size + h * rng.uniform(0.06, 0.24) if pose == 0 else h * rng.uniform(0.85, 0.99)
    figure = OBJECTS[kind][-1] if pose == 2 else FIGURES[kind][0]
    soft = blur(draw(rng, canvas, figure, [coat], size, at, pattern, lively=pose == 2), 2)
    return breed, develop(rng, canvas), np.where(soft > 0.9, 1, np.where(soft > 0.1, 3, 2)).astype(np.uint8)


def write_coco(folder, part, count, seed, stream, update):
    """Draw `count` photos into folder/part and their instances file; `update()` is called after each."""
    images, annotations = [], []
    (folder / part).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for index in range(count):
        (photo, labels), number = draw_coco(seed, stream, index), 1 + stream + index * 37
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "width": photo.width, "height": photo.height})
        photo.save(folder / part / images[-1]["file_name"], quality=90)
        for label, mask in labels:
            rows, columns, flat = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0)), mask.ravel(order="F")
            starts = np.flatnonzero(np.diff(flat, prepend=False))  # of the runs of 1 and 0 down the columns
            outline = {"size": mask.shape, "counts": np.diff(starts, prepend=0, append=flat.size).tolist()}
            box = [float(v) for v in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": label, "iscrowd": 0,
                                "bbox": box, "area": float(mask.sum()), "segmentation": outline})  # fmt: skip
        update()
    content = {"info": {"description": "drawn demo photos"}, "images": images, "annotations": annotations}
    (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps({**content, "categories": CATEGORIES}))


def write_pets(folder, count, seed, update):
    """Draw `count` pets into folder/images with trimaps and list.txt in the publisher's format."""
    trimaps, rows = folder / "annotations" / "trimaps", []
    trimaps.mkdir(parents=True)
    (folder / "images").mkdir()
    for index in range(count):
        breed, photo, trimap = draw_pet(seed, index)
        name = f"{breed}_{index // len(BREEDS) + 1}"
        photo.save(folder / "images" / f"{name}.jpg", quality=90)
        Image.fromarray(trimap).save(trimaps / f"{name}.png")
        rows.append(" ".join([name, *BREEDS[breed][:3]]))
        update()
    (trimaps.parent / "list.txt").write_text("\n".join(["#Image CLASS-ID SPECIES BREED ID", *sorted(rows)]) + "\n")
