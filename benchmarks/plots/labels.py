"""Names beside points and lines, placed so that they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import style

GAP = 2.0  # points around a label
RADII = (7, 12, 18, 26, 36, 48, 62, 78, 96, 120, 150)  # points between a label and its point
ANGLES = 24
MARK = 4.5  # half the width of a point's mark
LEADER = 14  # a label farther away than this, or than other points, gets a line to its point
ROUNDS = 3  # the first places, the others repair with all in place
STEPS = np.linspace(0, 1, 20)[:, None, None]  # along a leader
NEAR = 3  # points from a line at which a leader touches it
# What a place costs beside its distance in points: out of the frame, over another label, over a point, over a line;
# another point nearer than the own; a leader through a label, a point, a line.
OUTSIDE, ON_LABEL, ON_POINT, ON_LINE, RIVAL, LEADER_ON_LABEL, LEADER_ON_POINT, LEADER_ON_LINE = (
    1e4, 1e3, 500, 40, 12, 90, 60, 25,
)  # fmt: skip

# Arrays below: places (n, 4) with left, bottom, right, top; points (n, 2); all in pixels, which are points here.


def place(axes, points: Sequence[tuple[float, float]], names: Sequence[tuple[str, str]], avoid: Any) -> list[Any]:
    """Writes names, (text, colour) each, beside `points` (data coordinates), where possible off `avoid`, (n, 2) pixels.

    Returns the texts. The axes' limits must be final.
    """
    texts = [
        axes.text(x, y, name, fontsize=8, color=colour, va="bottom", zorder=5)
        for (x, y), (name, colour) in zip(points, names, strict=True)
    ]
    at, avoid = axes.transData.transform(points), np.asarray(avoid)
    window = axes.get_window_extent()
    frame = np.array([window.x0, window.y0, window.x1, window.y1])
    lines = _mask(avoid, frame)
    choices, fixed = [], []
    for i, text in enumerate(texts):
        extent = text.get_window_extent()
        choices.append(_around(at[i], extent.width + 2 * GAP, extent.height + 2 * GAP))
        fixed.append(_fixed_cost(choices[i], at, i, avoid, lines, frame))
    crowded = sorted(range(len(at)), key=lambda i: (-(np.hypot(*(at - at[i]).T) < 60).sum(), i))
    orders = [crowded, crowded[::-1], *(sorted(crowded, key=key) for key in (lambda i: at[i, 0], lambda i: at[i, 1]))]
    _, chosen = min((_arrange(order, at, choices, fixed) for order in orders), key=lambda found: found[0])
    to_data = axes.transData.inverted()
    for i, text in enumerate(texts):
        text.set_position(to_data.transform(chosen[i][:2] + GAP))
        distances = _distances(chosen[i][None], at)[0]
        rivals = np.delete(distances, i)
        if distances[i] > min(LEADER, 1.3 * rivals.min(initial=LEADER)):
            ends = to_data.transform([at[i], _nearest(chosen[i][None], at[i])[0]])
            axes.plot(ends[:, 0], ends[:, 1], color=text.get_color(), linewidth=0.6, zorder=2)
    return texts


def _arrange(order: list[int], at, choices: list[Any], fixed: list[Any]) -> tuple[float, dict[int, Any]]:
    """Labels placed one after the other: what it costs in all, and the place of each."""
    chosen: dict[int, Any] = {}
    costs: dict[int, float] = {}
    for _ in range(ROUNDS):
        for i in order:
            others = [j for j in chosen if j != i]
            cost = fixed[i]
            if others:
                cost = cost + _cost_beside(choices[i], at[i], np.array([chosen[j] for j in others]), at[others])
            chosen[i], costs[i] = choices[i][cost.argmin()], float(cost.min())
    return sum(costs.values()), chosen


def _around(point, width: float, height: float):
    """Places for a label of this size all around a point, (n, 4)."""
    turn = 2 * np.pi * np.arange(ANGLES) / ANGLES
    direction, size = np.stack([np.cos(turn), np.sin(turn)], -1), np.array([width, height])
    corner = (point + np.array(RADII)[:, None, None] * direction + (direction - 1) / 2 * size).reshape(-1, 2)
    return np.concatenate([corner, corner + size], -1)


def _mask(pixels, frame):
    """The frame as booleans, (height, width): what is near one of the pixels."""
    width, height = np.ceil(frame[2:] - frame[:2]).astype(int)
    mask = np.zeros((height, width), bool)
    reach = np.stack(np.meshgrid(*2 * [np.arange(-NEAR, NEAR + 1)]), -1).reshape(-1, 1, 2)
    x, y = (pixels - frame[:2] + reach[np.hypot(*reach.T)[0] <= NEAR]).round().astype(int).reshape(-1, 2).T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    mask[y[inside], x[inside]] = True
    return mask


def _fixed_cost(places, points, own: int, avoid, lines, frame):
    """What each place costs whatever the other labels do, (n,)."""
    distances = _distances(places, points)
    leader = _leader(places, points[own])
    others = np.delete(points, own, 0)
    outside = (places[:, :2] < frame[:2]).any(-1) | (places[:, 2:] > frame[2:]).any(-1)
    crossed = (np.hypot(*np.moveaxis(leader[:, :, None] - others, -1, 0)) < 1.5 * MARK).any(0).sum(-1)
    x, y = np.moveaxis((leader - frame[:2]).round().astype(int), -1, 0)
    on_line = lines[y.clip(0, lines.shape[0] - 1), x.clip(0, lines.shape[1] - 1)].sum(0)
    return (
        distances[:, own]
        + OUTSIDE * outside
        + ON_POINT * (_distances(places, points, chebyshev=True) < MARK).sum(-1)
        + ON_LINE * _inside(avoid, places).sum(-1)
        + RIVAL * (np.delete(distances, own, 1) < 1.3 * distances[:, own, None]).sum(-1)
        + LEADER_ON_POINT * crossed
        + LEADER_ON_LINE * on_line
    )


def _cost_beside(places, point, others, their_points):
    """What each place costs with the other labels, (m, 4), and their points where they are now, (n,)."""
    sides = np.minimum(places[:, None, 2:], others[:, 2:]) - np.maximum(places[:, None, :2], others[:, :2])
    area = np.where((sides > 0).all(-1), sides.prod(-1), 0)
    leaders = _leader(places, point)[:, :, None]
    through_it = ((leaders >= others[:, :2]) & (leaders <= others[:, 2:])).all(-1).any(0)
    theirs = _leader(others, their_points)
    through_this = _inside(theirs.reshape(-1, 2), places).reshape(len(places), *theirs.shape[:2]).any(1)
    return (np.where(area > 0, ON_LABEL + area, 0) + LEADER_ON_LABEL * through_it + LEADER_ON_LABEL * through_this).sum(
        1
    )


def _nearest(places, point):
    """The nearest point of each place to a point, or to its own, (n, 2)."""
    return np.clip(point, places[:, :2], places[:, 2:])


def _leader(places, point):
    """Points along the line from each place to a point, or to its own, (steps, n, 2)."""
    return _nearest(places, point) * (1 - STEPS) + point * STEPS


def _distances(places, points, chebyshev: bool = False):
    """Between every place and every point, (places, points)."""
    apart = np.abs(np.clip(points, places[:, None, :2], places[:, None, 2:]) - points)
    return apart.max(-1) if chebyshev else np.hypot(apart[..., 0], apart[..., 1])


def _inside(points, places):
    return ((points >= places[:, None, :2]) & (points <= places[:, None, 2:])).all(-1)


def spread(axes, ends: Sequence[tuple[float, str, str]], least: float = 11.0) -> None:
    """Names lines at the right edge of the axes: (y, name, colour) each, at least `least` pixels apart."""
    window = axes.get_window_extent()
    wanted = sorted((axes.transData.transform((axes.get_xlim()[1], y))[1], name, colour) for y, name, colour in ends)
    at = [y for y, _, _ in wanted]
    for _ in range(200):  # neighbours push each other apart until none is too near
        for i in range(len(at) - 1):
            short = least - (at[i + 1] - at[i])
            if short > 1e-6:
                at[i], at[i + 1] = at[i] - short / 2, at[i + 1] + short / 2
    for y, (target, name, colour) in zip(at, wanted, strict=True):
        line, tip = ((p - window.y0) / window.height for p in (target, y))
        axes.plot(
            [1.0, 1.025], [line, tip], transform=axes.transAxes, color=style.SOFT, linewidth=0.6, clip_on=False
        )  # fmt: skip
        axes.text(1.03, tip, name, transform=axes.transAxes, va="center", color=colour, fontsize=8.5)
