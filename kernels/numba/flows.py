"""Contract: fastembed/cellpose/masks.py. Sums in cellpose's order, so no fast math."""

import numpy as np
from numba import njit

# Rows of the table of boxes.
_Y0, _X0, _Y1, _X1 = range(4)


@njit(nogil=True)
def centers(labels, boxes):
    """The pixel of each object that is nearest to its centre of mass: int64 [n, 2]."""
    out = np.zeros((boxes.shape[0], 2), dtype=np.int64)
    for i in range(boxes.shape[0]):
        y0, x0, y1, x1 = boxes[i]
        count = sum_y = sum_x = 0
        for y in range(y0, y1):
            for x in range(x0, x1):
                if labels[y, x] == i + 1:
                    count += 1
                    sum_y += y - y0
                    sum_x += x - x0
        # Rounded within the box: half to even depends on where 0 is.
        mean_y = np.int64(np.rint(sum_y / count)) + y0
        mean_x = np.int64(np.rint(sum_x / count)) + x0
        nearest = np.int64(0x7FFFFFFFFFFFFFFF)
        for y in range(y0, y1):
            for x in range(x0, x1):
                if labels[y, x] == i + 1:
                    distance = (x - mean_x) ** 2 + (y - mean_y) ** 2
                    if distance < nearest:
                        nearest = distance
                        out[i, 0] = y
                        out[i, 1] = x
    return out


@njit(nogil=True)
def diffuse(labels, boxes, sources, steps, heat):
    """Heat that spreads from each object's centre within it, into heat [H + 2, W + 2]."""
    for i in range(boxes.shape[0]):
        y0, x0, y1, x1 = boxes[i]
        height, width = y1 - y0, x1 - x0
        now = np.zeros((height + 2, width + 2), dtype=heat.dtype)
        after = np.zeros((height + 2, width + 2), dtype=heat.dtype)
        inside = np.zeros((height, width), dtype=heat.dtype)
        for y in range(height):
            for x in range(width):
                if labels[y0 + y, x0 + x] == i + 1:
                    inside[y, x] = 1
        center_y, center_x = sources[i, 0] - y0 + 1, sources[i, 1] - x0 + 1
        for _ in range(steps):
            now[center_y, center_x] += 1
            for y in range(height):
                _spread(now[y], now[y + 1], now[y + 2], inside[y], after[y + 1])
            now, after = after, now
        for y in range(height):
            for x in range(width):
                if inside[y, x] > 0:
                    heat[y0 + y + 1, x0 + x + 1] = now[y + 1, x + 1]


@njit(nogil=True)
def _spread(above, row, below, inside, out):
    nine = row.dtype.type(9)
    for x in range(inside.size):
        # In cellpose's order of the neighbours; outside the object all are 0.
        total = row[x + 1] + above[x + 1]
        total += below[x + 1]
        total += row[x]
        total += row[x + 2]
        total += above[x]
        total += above[x + 2]
        total += below[x]
        total += below[x + 2]
        out[x + 1] = total / nine * inside[x]


@njit(nogil=True)
def fill_holes(labels, boxes):
    """Gives every pixel that an object shuts off from its box's border (4-connected) to it.

    Returns how many objects had such pixels.
    """
    area = filled = 0
    for y0, x0, y1, x1 in boxes:
        area = max(area, (y1 - y0) * (x1 - x0))
    stack = np.empty((area, 2), dtype=np.int32)
    for i in range(boxes.shape[0]):
        y0, x0, y1, x1 = boxes[i]
        if y1 - y0 > 2 and x1 - x0 > 2:
            filled += _fill(labels[y0:y1, x0:x1], labels.dtype.type(i + 1), stack)
    return filled


@njit(nogil=True)
def _fill(box, label, stack):
    height, width = box.shape
    open_ = np.zeros(box.shape, dtype=np.bool_)
    depth = 0
    reached = objects = 0
    for y in range(height):
        step = 1 if y == 0 or y == height - 1 else max(width - 1, 1)
        for x in range(0, width, step):
            if box[y, x] != label and not open_[y, x]:
                open_[y, x] = True
                stack[depth, 0], stack[depth, 1] = y, x
                depth += 1
    while depth > 0:
        depth -= 1
        reached += 1
        y, x = stack[depth]
        for side in range(4):
            v = y + (side == 0) - (side == 1)
            u = x + (side == 2) - (side == 3)
            if 0 <= v < height and 0 <= u < width and not open_[v, u] and box[v, u] != label:
                open_[v, u] = True
                stack[depth, 0], stack[depth, 1] = v, u
                depth += 1
    for y in range(height):
        for x in range(width):
            if box[y, x] == label:
                objects += 1
    if reached + objects == height * width:
        return 0
    for y in range(height):
        for x in range(width):
            if not open_[y, x]:
                box[y, x] = label
    return 1
