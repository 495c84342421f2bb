"""The scenes that the embedded pipeline draws, and the captions that name them.

A scene has one to three objects, each of a size, a colour and a shape, in a layout, on a background of a colour and a
texture. A caption names all of it, so that what a picture shows can be checked against its caption word by word.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross")
BACKGROUNDS = ("white", "grey", "pink", "cyan")
TEXTURES = ("plain", "striped", "checkered")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
LAYOUTS = ("centre", *CORNERS, "side by side", "one above the other", "row", "column")
_OBJECTS = {"side by side": 2, "one above the other": 2, "row": 3, "column": 3}
_RELATIONS = {"side by side": ("left of", "right of"), "one above the other": ("above", "below")}


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        layout: one of `LAYOUTS`: where the one object is, or how several are arranged.
        things: the objects from left to right or from top to bottom.
        background: the background's colour.
        texture: the background's texture.
    """

    layout: str
    things: tuple[Thing, ...]
    background: str
    texture: str

    @property
    def held_out(self) -> bool:
        """Whether an object of the scene is of the twentieth that is kept out of training on this background.

        Of the 720 combinations of size, colour, shape, background and texture, 5% never occur in a training picture,
        however many objects it has.
        """
        combinations = [f"{thing} {self.texture} {self.background}" for thing in self.things]
        return any(zlib.crc32(combination.encode()) % 20 == 0 for combination in combinations)

    def attributes(self) -> dict[str, str]:
        """Everything that the caption says, by name."""
        named = {"layout": self.layout, "background": self.background, "texture": self.texture}
        for place, thing in enumerate(self.things):
            named |= {f"size {place}": thing.size, f"colour {place}": thing.colour, f"shape {place}": thing.shape}
        return named

    def caption(self, rng: random.Random) -> str:
        """Words for the scene; where there are several ways to say it, ``rng`` chooses one."""
        return f"{self._objects(rng)} on a {self.texture} {self.background} background"

    def _objects(self, rng: random.Random) -> str:
        if len(self.things) == 1:
            return f"{self.things[0]} in the {self.layout}"
        if len(self.things) == 3:
            first, second, third = self.things
            return f"{first}, {second} and {third} in a {self.layout}"
        first, second = self.things
        before, after = _RELATIONS[self.layout]
        return f"{first} {before} {second}" if rng.random() < 0.5 else f"{second} {after} {first}"


def random_scene(rng: random.Random) -> Scene:
    """Return a scene drawn from all: one, two or three objects with equal chance."""
    count = rng.randint(1, 3)
    layout = rng.choice([name for name in LAYOUTS if _OBJECTS.get(name, 1) == count])
    things = tuple(Thing(rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES)) for _ in range(count))
    return Scene(layout, things, rng.choice(BACKGROUNDS), rng.choice(TEXTURES))


def scenes(count: int, *, seed: int, held_out: bool) -> list[Scene]:
    """Return the first ``count`` scenes of a seed, either those kept out of training or those trained on."""
    rng = random.Random(seed)
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(rng)
        if scene.held_out is held_out:
            found.append(scene)
    return found
