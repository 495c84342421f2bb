"""Pictures side by side, with a heading above each column and a caption under each row."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_CELL = 192
_GAP = 12
_HEADING = 48
_CAPTION = 26
_FONT_SIZE = 15


def grid(columns: Sequence[Sequence[Image.Image]], headings: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """One picture of all.

    Args:
        columns: the pictures of each column, from the top.
        headings: a heading for each column, of up to two lines.
        captions: a caption for each row.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    width = max(
        len(columns) * (_CELL + _GAP) + _GAP, max(int(font.getlength(caption)) for caption in captions) + 2 * _GAP
    )
    image = Image.new("RGB", (width, _HEADING + len(captions) * (_CELL + _CAPTION + _GAP)), "white")
    canvas = ImageDraw.Draw(image)
    for index, (pictures, heading) in enumerate(zip(columns, headings, strict=True)):
        left = _GAP + index * (_CELL + _GAP)
        canvas.multiline_text((left + _CELL / 2, _HEADING / 2), heading, "black", font, anchor="mm", align="center")
        for row, picture in enumerate(pictures):
            enlarged = picture.resize((_CELL, _CELL), Image.Resampling.NEAREST)
            image.paste(enlarged, (left, _HEADING + row * (_CELL + _CAPTION + _GAP)))
    for row, caption in enumerate(captions):
        canvas.text((_GAP, _HEADING + row * (_CELL + _CAPTION + _GAP) + _CELL + 4), caption, "black", font)
    return image
