"""What processors give of prompts with images, made of random pixels for the tiny models that take images."""

from __future__ import annotations

import torch
from tiny_configs import IMAGE

LABELS = ["llava", "llava-mistral", "llava-pixtral", "llava_next", "smolvlm", "idefics3", "gemma3"]
LABELS += ["qwen2_vl", "qwen2_vl-window", "qwen2_5_vl", "qwen3_vl"]
SIDE = 8  # pixels of what an encoder sees at once
SIZES = [(8, 16), (16, 8), (13, 15), (8, 8)]  # height and width of images that LLaVA-NeXT cuts up
RAGGED = [(8, 12), (16, 4), (12, 12), (4, 8)]  # height and width of images that Pixtral sees as they are
GRIDS = [(1, 4, 4), (1, 2, 6), (1, 6, 4), (1, 2, 2)]  # time, height and width of Qwen's images, in patches
PIXELS = ("pixel_values", "image_sizes", "pixel_attention_mask")


def picture(label: str, seed: int) -> dict:
    """The pixels of one image, as a processor gives them."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    if label in ("smolvlm", "idefics3"):
        tiles = 1 + seed % 3
        mask = torch.ones(1, tiles, SIDE, SIDE, dtype=torch.int64)
        mask[:, :, :, SIDE - 2 * (seed % 2) :] = 0
        return dict(pixel_values=random(1, tiles, 3, SIDE, SIDE), pixel_attention_mask=mask)
    if label == "llava_next":
        height, width = SIZES[seed % len(SIZES)]
        patches = 1 + {(8, 16): 2, (16, 8): 2}.get((height, width), 4 if height > 8 else 2)
        return dict(pixel_values=random(1, patches, 3, SIDE, SIDE), image_sizes=torch.tensor([[height, width]]))
    if label == "llava-pixtral":
        height, width = RAGGED[seed % len(RAGGED)]
        return dict(pixel_values=random(1, 3, height, width), image_sizes=torch.tensor([[height, width]]))
    if label.startswith("qwen"):
        grid = torch.tensor([GRIDS[seed % len(GRIDS)]])
        return dict(pixel_values=random(int(grid.prod()), 3 * 2 * 4 * 4), image_grid_thw=grid)
    return dict(pixel_values=random(1, 3, SIDE, SIDE))


def lengths(model, label: str, image: dict) -> list[int]:
    """Tokens that stand for each part of an image, asked of the model's own encoder."""
    with torch.no_grad():
        pooled = model.base_model.get_image_features(**image, return_dict=True).pooler_output
    parts = len(image["pixel_values"][0]) if label in ("smolvlm", "idefics3") else 1
    total = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in pooled)
    return [total // parts] * parts


def prompt(model, label: str, row: list) -> tuple[list[int], list[dict]]:
    """(token ids, images) of a row: token ids, and in place of an image its seed."""
    ids, images = [], []
    for piece in row:
        if isinstance(piece, int):
            ids.append(piece)
            continue
        images.append(picture(label, piece[0]))
        if label == "llava-pixtral":  # row by row
            height, width = (images[-1]["image_sizes"][0] // 4).tolist()
            ids += ([*[IMAGE] * width, 193] * height)[:-1] + [192]
            continue
        for length in lengths(model, label, images[-1]):  # each part stands between tokens of its own
            ids += [191, *[IMAGE] * length, 192]
    return ids, images


def joined(label: str, rows: list[list[dict]]) -> dict:
    """The images of all rows as one batch."""
    images = [image for row in rows for image in row]
    if not images:
        return {}
    if label in ("smolvlm", "idefics3"):
        most = max(sum(image["pixel_values"].shape[1] for image in row) for row in rows)
        result = {}
        for name, value in images[0].items():
            padded = torch.zeros(len(rows), most, *value.shape[2:], dtype=value.dtype)
            for index, row in enumerate(rows):
                if row:
                    tiles = torch.cat([image[name] for image in row], 1)[0]
                    padded[index, : len(tiles)] = tiles
            result[name] = padded
        return result
    if label == "llava-pixtral":
        height, width = (max(image["pixel_values"].shape[dim] for image in images) for dim in (2, 3))
        padded = torch.zeros(len(images), 3, height, width)
        for index, image in enumerate(images):
            own = image["pixel_values"][0]
            padded[index, :, : own.shape[1], : own.shape[2]] = own
        return dict(pixel_values=padded, image_sizes=torch.cat([image["image_sizes"] for image in images]))
    if label == "llava_next":
        most = max(image["pixel_values"].shape[1] for image in images)
        pad = lambda value: torch.nn.functional.pad(value, (0,) * 6 + (0, 0, 0, most - value.shape[1])[2:])  # noqa: E731
        return dict(
            pixel_values=torch.cat([pad(image["pixel_values"]) for image in images]),
            image_sizes=torch.cat([image["image_sizes"] for image in images]),
        )
    return {name: torch.cat([image[name] for image in images]) for name in images[0]}


def batch(model, label: str, rows: list[list]) -> dict:
    """Left-padded inputs of `generate` for rows as `prompt` takes them."""
    made = [prompt(model, label, row) for row in rows]
    width = max(len(ids) for ids, _ in made)
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in made])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in made])
    inputs = dict(input_ids=ids, attention_mask=mask, **joined(label, [images for _, images in made]))
    if label == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    if label.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs
