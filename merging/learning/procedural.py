"""Pictures that no data set has: noise, shapes, strokes and textures, each drawn from a seed and its number alone.

A picture is (S, S, 3), bytes. Of every twelve in a row, ten are one of each kind below, one is white noise and one
smooth noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterable

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Draw = np.random.Generator


def pictures(numbers: Iterable[int], size: int, seed: int) -> Array:
    """The pictures of these numbers, (B, size, size, 3) uint8; each is the same whatever it is drawn with."""
    import numpy as np

    drawn = [_picture(number, size, seed) for number in numbers]
    return np.stack(drawn) if drawn else np.zeros((0, size, size, 3), np.uint8)


def _picture(number: int, size: int, seed: int) -> Array:
    import numpy as np

    draw = np.random.default_rng([seed % 2**64, number])
    return (np.clip(_KINDS[number % len(_KINDS)](draw, size), 0, 1) * 255).round().astype(np.uint8)


# --------------------------------------------------------------------------------------- kinds, (S, S, 3) in [0, 1]


def _coloured_noise(draw: Draw, size: int) -> Array:
    """Of a power spectrum that falls as 1 / f to a power, with colours that agree more or less."""
    grey, colour = _noise(draw, size, draw.uniform(0.5, 2.5)), draw.uniform(0, 1)
    field = [grey + colour * _noise(draw, size, draw.uniform(0.5, 2.5)) for _ in range(3)]
    return _spread(_stacked(field), draw)


def _blotches(draw: Draw, size: int) -> Array:
    """Few colours, bounded by levels of smooth noise."""
    import numpy as np

    levels = int(draw.integers(2, 6))
    field = _noise(draw, size, draw.uniform(1.5, 3))
    edges = np.quantile(field, np.sort(draw.uniform(0, 1, levels - 1)))
    return draw.uniform(0, 1, (levels, 3))[np.searchsorted(edges, field)]


def _dead_leaves(draw: Draw, size: int) -> Array:
    """Discs that cover one another, small ones more often."""
    y, x = _grid(size)
    image = _plain(draw, size)
    for _ in range(int(draw.integers(20, 80))):
        radius = 0.03 / draw.uniform(0.08, 1)
        inside = (x - draw.uniform()) ** 2 + (y - draw.uniform()) ** 2 < radius**2
        image[inside] = draw.uniform(0, 1, 3)
    return image


def _polygons(draw: Draw, size: int) -> Array:
    image = _plain(draw, size)
    for _ in range(int(draw.integers(1, 6))):
        centre, radius = draw.uniform(0.1, 0.9, 2), draw.uniform(0.1, 0.4)
        image[_polygon(draw, size, centre, radius)] = draw.uniform(0, 1, 3)
    return image


def _centred_shape(draw: Draw, size: int) -> Array:
    """A disc, an ellipse, a ring or a polygon in the middle, filled or as an outline."""
    import numpy as np

    y, x = _grid(size)
    radius, centre = draw.uniform(0.2, 0.42), draw.uniform(0.42, 0.58, 2)
    if draw.uniform() < 0.5:
        squeeze = draw.uniform(0.5, 1)
        from_centre = np.hypot(x - centre[0], (y - centre[1]) / squeeze)
        inside = from_centre < radius
        if draw.uniform() < 0.4:
            inside &= from_centre > radius * draw.uniform(0.5, 0.85)
    else:
        inside = _polygon(draw, size, centre, radius)
    return _figure(draw, size, inside)


def _waves(draw: Draw, size: int) -> Array:
    """A gradient, or a grating of some frequency and direction."""
    import numpy as np

    y, x = _grid(size)
    angle = draw.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if draw.uniform() < 0.5:
        part = (along - along.min()) / (np.ptp(along) or 1)
    else:
        part = 0.5 + 0.5 * np.sin(2 * np.pi * draw.uniform(1, size / 4) * along + draw.uniform(0, 2 * np.pi))
        part = (part > 0.5).astype(float) if draw.uniform() < 0.4 else part
    return _between(draw, part)


def _strokes(draw: Draw, size: int) -> Array:
    """Lines and curves anywhere, of many colours."""
    image = _plain(draw, size)
    for _ in range(int(draw.integers(1, 8))):
        points = _curve(draw, draw.uniform(0, 1, (3, 2)))
        image = _painted(image, _near(size, points, draw.uniform(0.01, 0.06)), draw.uniform(0, 1, 3))
    return image


def _glyph(draw: Draw, size: int) -> Array:
    """A few connected strokes of one width in the middle, one colour on another, often white on black or reversed."""
    import numpy as np

    width, start, ink = draw.uniform(0.02, 0.06), draw.uniform(0.25, 0.75, 2), np.zeros((size, size))
    for _ in range(int(draw.integers(2, 6))):
        points = np.stack([start, draw.uniform(0.15, 0.85, 2), draw.uniform(0.15, 0.85, 2)])
        curve = _curve(draw, points)
        ink = np.maximum(ink, _near(size, curve, width))
        start = curve[int(draw.integers(len(curve)))]
    if draw.uniform() < 0.7:
        dark, light = sorted([0.15 * draw.uniform(), 1 - 0.15 * draw.uniform()], reverse=draw.uniform() < 0.5)
        return np.repeat((dark + (light - dark) * ink)[..., None], 3, 2)
    return _painted(_plain(draw, size), ink, draw.uniform(0, 1, 3))


def _pasted(draw: Draw, size: int) -> Array:
    """Rectangles of other kinds of pictures, beside and over one another."""
    image = _coloured_noise(draw, size)
    for _ in range(int(draw.integers(2, 6))):
        other = (_waves, _blotches, _coloured_noise, _polygons)[int(draw.integers(4))](draw, size)
        height, width = (max(1, int(side)) for side in draw.uniform(0.2, 0.7, 2) * size)
        top, left = int(draw.integers(size - height + 1)), int(draw.integers(size - width + 1))
        image[top : top + height, left : left + width] = other[:height, :width]
    return image


def _textured_figure(draw: Draw, size: int) -> Array:
    """A figure of one texture on another or a plain ground."""
    textures = (_waves, _blotches, _coloured_noise, _strokes)
    figure = textures[int(draw.integers(4))](draw, size)
    ground = textures[int(draw.integers(4))](draw, size) if draw.uniform() < 0.5 else _plain(draw, size)
    inside = _polygon(draw, size, draw.uniform(0.4, 0.6, 2), draw.uniform(0.25, 0.45))
    ground[inside] = figure[inside]
    return ground


def _white_noise(draw: Draw, size: int) -> Array:
    return _spread(draw.standard_normal((size, size, 3)), draw)


def _smooth_noise(draw: Draw, size: int) -> Array:
    return _spread(
        _stacked([_noise(draw, size, 3.0)] * 3) + _stacked([_noise(draw, size, 3.0) for _ in "RGB"]), draw
    )


_KINDS: tuple[Callable[[Draw, int], Array], ...] = (
    _coloured_noise, _blotches, _dead_leaves, _polygons, _centred_shape, _waves, _strokes, _glyph, _pasted,
    _textured_figure, _white_noise, _smooth_noise,
)  # fmt: skip


# --------------------------------------------------------------------------------------- what they are made of


def _grid(size: int) -> tuple[Array, Array]:
    """y and x of the middles of pixels, (S, S) each, of a picture of side 1."""
    import numpy as np

    middles = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(middles, middles, indexing="ij")
    return y, x


def _plain(draw: Draw, size: int) -> Array:
    """One colour: any, or nearly black or white."""
    import numpy as np

    level = draw.uniform()
    colour = draw.uniform(0, 1, 3) if level < 0.5 else np.full(3, 0.05 if level < 0.75 else 0.95)
    return np.tile(colour, (size, size, 1))


def _stacked(channels: list[Array]) -> Array:
    import numpy as np

    return np.stack(channels, 2)


def _noise(draw: Draw, size: int, power: float) -> Array:
    """(S, S) of mean 0 and deviation 1, whose amplitudes fall as 1 / f^power."""
    import numpy as np

    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    field = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((size, size))) / frequency**power, s=(size, size))
    return (field - field.mean()) / (field.std() or 1.0)


def _spread(field: Array, draw: Draw) -> Array:
    """Numbers around 0 as a picture of some brightness and contrast."""
    return draw.uniform(0.3, 0.7) + draw.uniform(0.1, 0.35) * field / (field.std() or 1.0)


def _between(draw: Draw, part: Array) -> Array:
    """From one colour (part 0) to another (1)."""
    first, second = draw.uniform(0, 1, (2, 3))
    return first + part[..., None] * (second - first)


def _figure(draw: Draw, size: int, inside: Array) -> Array:
    image = _plain(draw, size)
    image[inside] = draw.uniform(0, 1, 3)
    return image


def _polygon(draw: Draw, size: int, centre: Array, radius: float) -> Array:
    """Whether pixels are inside of a star-shaped polygon of three to eight corners around a point."""
    import numpy as np

    y, x = _grid(size)
    corners = int(draw.integers(3, 9))
    angles = np.sort(
        draw.uniform(0, 2 * np.pi)
        + 2 * np.pi * (np.arange(corners) + draw.uniform(-0.3, 0.3, corners)) / corners
    )
    radii = radius * draw.uniform(0.6, 1, corners)
    px, py = centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles)
    inside = np.zeros((size, size), bool)
    for ax, ay, bx, by in zip(px, py, np.roll(px, -1), np.roll(py, -1)):
        crossed = (ay > y) != (by > y)
        inside ^= crossed & (x < (bx - ax) * (y - ay) / ((by - ay) or 1e-9) + ax)
    return inside


def _curve(draw: Draw, points: Array) -> Array:
    """Points on a quadratic curve through three control points, or on its straight chord."""
    import numpy as np

    t = np.linspace(0, 1, 24)[:, None]
    if draw.uniform() < 0.3:
        return (1 - t) * points[0] + t * points[2]
    return (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]


def _near(size: int, points: Array, width: float) -> Array:
    """(S, S) in [0, 1]: 1 within `width` of a point, 0 a pixel further away."""
    import numpy as np

    y, x = _grid(size)
    distance = np.full((size, size), np.inf)
    for px, py in points:
        distance = np.minimum(distance, (x - px) ** 2 + (y - py) ** 2)
    return np.clip((width - np.sqrt(distance)) * size + 1, 0, 1)


def _painted(image: Array, ink: Array, colour: Array) -> Array:
    return image + ink[..., None] * (colour - image)
