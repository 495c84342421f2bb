"""Draw a scene as a picture of 64×64 pixels: flat shapes with smooth edges, each a little off its place and colour."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from tgate_fx.demo.scenes import Scene, Thing

SIZE = 64
_SCALE = 4  # drawn so much larger, then averaged
_RADIUS = {"small": 6.0, "large": 10.0}
_COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
}
_BACKGROUNDS = {"white": (250, 250, 250), "grey": (180, 180, 180), "pink": (250, 190, 205), "cyan": (170, 230, 235)}
_DARKER = 0.86  # the second colour of stripes and checkers
_PERIOD = 16
_CENTRES = {
    "centre": [(32, 32)],
    "top left": [(16, 16)],
    "top right": [(48, 16)],
    "bottom left": [(16, 48)],
    "bottom right": [(48, 48)],
    "side by side": [(18, 32), (46, 32)],
    "one above the other": [(32, 18), (32, 46)],
    "row": [(11.5, 32), (32, 32), (52.5, 32)],
    "column": [(32, 11.5), (32, 32), (32, 52.5)],
}
_JITTER = {1: 3.0, 2: 2.5, 3: 0.7}  # in pixels along a line of so many objects; across it always as one object


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """The picture as uint8 [64, 64, 3]."""
    image = Image.fromarray(_background(scene, rng)).resize((SIZE * _SCALE,) * 2, Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(image)
    along = _JITTER[len(scene.things)]
    jitter = (along, 3.0) if scene.layout == "row" else (3.0, along) if scene.layout == "column" else (along, along)
    for thing, centre in zip(scene.things, _CENTRES[scene.layout], strict=True):
        x, y = (c + rng.uniform(-j, j) for c, j in zip(centre, jitter, strict=True))
        _draw_thing(canvas, thing, x, y, rng)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def _background(scene: Scene, rng: random.Random) -> np.ndarray:
    light = np.array(_jittered(_BACKGROUNDS[scene.background], rng), dtype=float)
    y, x = np.mgrid[:SIZE, :SIZE]
    shift_x, shift_y, half = rng.randrange(_PERIOD), rng.randrange(_PERIOD), _PERIOD // 2
    across, down = (x + shift_x) // half % 2, (y + shift_y) // half % 2
    dark = {"plain": np.zeros_like(x), "striped": down, "checkered": across ^ down}[scene.texture]
    return (light * np.where(dark, _DARKER, 1.0)[..., None]).round().astype(np.uint8)


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, rng: random.Random) -> None:
    radius = _RADIUS[thing.size] * rng.uniform(0.95, 1.05)
    fill = _jittered(_COLOURS[thing.colour], rng)
    if thing.shape == "circle":
        box = [_SCALE * v for v in (x - radius, y - radius, x + radius, y + radius)]
        canvas.ellipse(box, fill=fill)
        return
    outline = [(_SCALE * (x + radius * u), _SCALE * (y + radius * v)) for u, v in _OUTLINES[thing.shape]]
    canvas.polygon(outline, fill=fill)


def _jittered(colour: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, round(c + rng.uniform(-10, 10)))) for c in colour)


def _star() -> list[tuple[float, float]]:
    corners = [(1.1 if i % 2 == 0 else 0.45, math.pi * (i / 5 - 0.5)) for i in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in corners]


def _cross(arm: float = 0.36) -> list[tuple[float, float]]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    return [(x * c - y * s, x * s + y * c) for c, s in turns for x, y in quarter]


_OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "star": _star(),
    "cross": _cross(),
}
