"""Procedural shapes in one GPU kernel: the same clouds as the reference in `data/procedural.py`.

A program makes one shape: it draws candidates and tests them until it has all the points, so candidates never leave
the chip, and the host is asked nothing between them. Every operation is rounded as it is there, one by one, but for
the angle that tells in which sector around an axis a point is.
"""

import torch
import triton
import triton.language as tl

from ..data import procedural
from ..data.procedural_recipes import MULTIPLIERS
from .gpu import _launch


CANDIDATES, WARPS = 256, 2  # that a program draws at a time, a divisor of the trial; and its warps
_MOST_SHAPES, _MOST_POINTS = 1 << 15, 1 << 29  # of a launch, so that places are numbers of 32 bits

_TABLE_SIZE = tl.constexpr(procedural._TABLE_SIZE)
_TABLE_STRIDE = tl.constexpr(procedural._TABLE_STRIDE)
_FIRST_CANDIDATE = tl.constexpr(procedural._FIRST_CANDIDATE)
_TINY = tl.constexpr(procedural._TINY)
_SINE_0, _SINE_1, _SINE_2, _SINE_3, _SINE_4 = (tl.constexpr(value) for value in procedural._SINE)
_MULTIPLIER_0, _MULTIPLIER_1 = (tl.constexpr(value) for value in MULTIPLIERS)
_ROUNDING = tl.constexpr(1.5 * 2.0**23)  # added and taken away, it rounds to whole numbers, halves to even ones
_TURN = tl.constexpr(0.15915494309189535)  # 1 / (2 pi)
# Rows of the table of tests: counts of copies around an axis, along the sides of a grid, the cross-section.
_RING, _GRID, _CROSS_SECTION = (
    tl.constexpr(rows.start) for rows in (procedural._RING, procedural._GRID, procedural._CROSS_SECTION)
)


@triton.jit
def _round(values):
    return (values + _ROUNDING) - _ROUNDING


@triton.jit
def _cosine(turns):
    """cos(2 pi turns)."""
    rest = 0.25 - tl.abs(turns - _round(turns))
    square = rest * rest
    value = square * _SINE_0
    value = (value + _SINE_1) * square
    value = (value + _SINE_2) * square
    value = (value + _SINE_3) * square
    return (value + _SINE_4) * rest


@triton.jit
def _turn_of(x, y):
    """The angle of a point in turns, -1/2 to 1/2, to 1e-7; the polynomial is our fit."""
    wide, high = tl.abs(x), tl.abs(y)
    ratio = tl.minimum(wide, high) / tl.maximum(tl.maximum(wide, high), 1e-30)
    square = ratio * ratio
    angle = 0.0241664752 - 0.0046688288 * square
    angle = 0.0990614719 + square * (-0.0593676443 + square * angle)
    angle = 0.1996924122 + square * (-0.1401660921 + square * angle)
    angle = ratio * (0.9999998979 + square * (-0.3333196033 + square * angle)) * _TURN
    angle = tl.where(high > wide, 0.25 - angle, angle)
    angle = tl.where(x < 0, 0.5 - angle, angle)
    return tl.where(y < 0, -angle, angle)


@triton.jit
def _mix_bits(bits):
    """A hash of int32 numbers."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * _MULTIPLIER_0
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * _MULTIPLIER_1
    return bits ^ ((bits >> 16) & 0xFFFF)


@triton.jit
def _coarse_uniform(bits):
    return (((bits >> 12) & 0xFFFFF).to(tl.float32) + 0.5) * 0.00000095367431640625


@triton.jit
def _fine_uniform(bits):
    return ((bits & 0xFFF).to(tl.float32) + 0.5) * 0.000244140625


@triton.jit
def _transformed(frame, row, stride, x, y, z):
    """One coordinate of points under a row of a 3 x 4 matrix, which begins at `frame + row * stride`."""
    frame += row * stride
    value = x * tl.load(frame) + y * tl.load(frame + stride)
    value = value + z * tl.load(frame + 2 * stride)
    return value + tl.load(frame + 3 * stride)


@triton.jit
def _distance(test, stride, x, y, z):
    """The implicit function of a primitive, whose numbers are `stride` apart from `test` on."""
    moved_x = _transformed(test, 0, stride, x, y, z)
    moved_y = _transformed(test, 4, stride, x, y, z)
    moved_z = _transformed(test, 8, stride, x, y, z)
    x, y, z = moved_x, moved_y, moved_z

    copies = tl.load(test + _RING * stride)
    if copies > 1:
        turn = tl.div_rn(_round(_turn_of(x, y) * copies), copies + tl.zeros_like(x))
        cosine, sine = _cosine(turn), _cosine(turn - 0.25)
        moved_x = cosine * x + sine * y
        moved_y = cosine * y - sine * x
        frame = test + (_RING + 1) * stride
        x = _transformed(frame, 0, stride, moved_x, moved_y, z)
        y = _transformed(frame, 4, stride, moved_x, moved_y, z)
        z = _transformed(frame, 8, stride, moved_x, moved_y, z)

    grid = test + _GRID * stride
    half_x, half_y = tl.load(grid), tl.load(grid + stride)
    if half_x + half_y > 0:
        number = tl.maximum(_round(x * tl.load(grid + 4 * stride) + half_x), 0.0)
        moved_x = x - (tl.minimum(number, 2 * half_x) - half_x) * tl.load(grid + 2 * stride)
        number = tl.maximum(_round(y * tl.load(grid + 5 * stride) + half_y), 0.0)
        moved_y = y - (tl.minimum(number, 2 * half_y) - half_y) * tl.load(grid + 3 * stride)
        frame = grid + 6 * stride
        x = _transformed(frame, 0, stride, moved_x, moved_y, z)
        y = _transformed(frame, 4, stride, moved_x, moved_y, z)
        z = _transformed(frame, 8, stride, moved_x, moved_y, z)

    section = test + _CROSS_SECTION * stride
    radius = tl.sqrt_rn(x * x + y * y) * tl.load(section + stride)
    x = tl.maximum(x, x * tl.load(section))
    y = tl.abs(y)
    radius = tl.maximum(radius, x)
    radius = tl.maximum(radius, x * tl.load(section + 2 * stride) + y * tl.load(section + 3 * stride))
    radius = tl.maximum(radius, x * tl.load(section + 4 * stride) + y * tl.load(section + 5 * stride))
    profile = section + 6 * stride
    across = tl.abs(radius - tl.load(profile)) - tl.load(profile + stride) - z * tl.load(profile + 2 * stride)
    up = (tl.abs(z) - tl.load(profile + 3 * stride)) * tl.load(profile + 4 * stride)
    inner = tl.minimum(tl.maximum(across, up), 0.0) - tl.load(profile + 5 * stride)
    across = tl.maximum(across, 0.0)
    up = tl.maximum(up, 0.0)
    both = across * up * tl.load(profile + 6 * stride)
    return tl.sqrt_rn(across * across + up * up + both) + inner


# These differ from batch to batch, and are not worth a compilation each.
_SIZES = ["num_shapes", "num_points", "least_kept", "most_candidates", "num_patches", "num_frames"]


@triton.jit(do_not_specialize=_SIZES)
def _sample_surface(
    points,
    found,
    key,
    entries,
    patches,
    frames,
    tests,
    adds,
    tolerance,
    num_primitives,
    num_shapes,
    num_points,
    least_kept,
    most_candidates,
    num_patches,
    num_frames,
    NUMBERS: tl.constexpr,
    TRIAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Points `(3, num_shapes, num_points)` of one shape, and how many were found; -1 if it failed the trial."""
    shape = tl.program_id(0)
    first, step = tl.load(key + 2 * shape), tl.load(key + 2 * shape + 1)
    entries += shape * _TABLE_SIZE
    margin_unit = tl.load(tolerance + shape)
    slots = tl.load(num_primitives + shape)
    count, kept, start = 0, 0, 0
    while (start < TRIAL) | ((kept >= least_kept) & (count < num_points) & (start < most_candidates)):
        number = start + tl.arange(0, CANDIDATES)
        entry = (first + number * _TABLE_STRIDE) & (_TABLE_SIZE - 1)
        patch = patches + tl.load(entries + entry)
        primitive = tl.load(patch)
        first_copy = tl.load(patch + num_patches)
        copies_per_entry = tl.load(patch + 2 * num_patches)
        first_entry = tl.load(patch + 3 * num_patches)
        radius = tl.load(patch + 4 * num_patches)
        height = tl.load(patch + 5 * num_patches)
        along_radius = tl.load(patch + 6 * num_patches)
        along_height = tl.load(patch + 7 * num_patches)
        is_arc = tl.load(patch + 8 * num_patches)
        stretch = tl.load(patch + 9 * num_patches)
        sides = tl.load(patch + 10 * num_patches)
        is_circle = tl.load(patch + 11 * num_patches)
        slant = tl.load(patch + 12 * num_patches)
        density = tl.load(patch + 13 * num_patches)

        counter = first + (number * 2 + _FIRST_CANDIDATE) * step
        bits = _mix_bits(counter)
        along, fine = _coarse_uniform(bits), _fine_uniform(bits)
        bits = _mix_bits(counter + step)
        around, chance = _coarse_uniform(bits), _fine_uniform(bits)
        fine = (fine + entry.to(tl.float32) - first_entry) * copies_per_entry
        instance = (tl.floor(fine) + first_copy).to(tl.int32)

        # Along the profile: evenly in area on a straight segment, evenly in angle on an arc.
        width = radius * 2 + along_radius
        root = tl.sqrt_rn(tl.maximum(along * along_radius * width + radius * radius, 0.0)) + radius
        straight = tl.div_rn(along * width, root + _TINY)
        along = along * 0.25
        cosine, sine = _cosine(along), _cosine(0.25 - along)
        radius = radius + along_radius * (is_arc * (cosine - straight) + straight)
        height = height + along_height * (is_arc * (sine - straight) + straight)
        along_radius = along_radius * (is_arc * (sine - 1) + 1)
        along_height = along_height * (is_arc * (cosine - 1) + 1)

        # Around the axis: an angle, or a side and a place on it.
        side = around * sides
        whole = tl.floor(side)
        turn = tl.div_rn(is_circle * around + whole, sides)
        cosine, sine = _cosine(turn), _cosine(turn - 0.25)
        off = ((side - whole) * 2 - 1) * slant * radius
        own_x = radius * cosine - off * sine
        own_y = (radius * sine + off * cosine) * stretch

        # The area that a step along the profile and one around the axis span.
        along_radius = along_radius * stretch
        sine = sine * along_height
        cosine = cosine * along_height * stretch
        area = tl.sqrt_rn(along_radius * along_radius + sine * sine + cosine * cosine)
        area = area * (is_arc * (radius - 1) + 1)
        keep = chance < area * density

        frame = frames + instance
        x = _transformed(frame, 0, num_frames, own_x, own_y, height)
        y = _transformed(frame, 4, num_frames, own_x, own_y, height)
        z = _transformed(frame, 8, num_frames, own_x, own_y, height)

        solid = tl.zeros_like(primitive) > 0
        visible = keep
        wanted = solid
        for slot in range(0, slots):
            adding = tl.load(adds + slot * num_shapes + shape) != 0
            test = tests + slot * NUMBERS * num_shapes + shape
            later = primitive - slot
            inside = _distance(test, num_shapes, x, y, z) <= tl.minimum(tl.maximum(later, -1.0), 1.0) * margin_unit
            visible = visible & ((inside & (later < 0)) == 0)
            inside = inside & (later > 0)
            if adding:
                solid = solid | inside
            else:
                wanted = wanted | (later == 0)
                solid = solid & (inside == 0)
        keep = visible & (solid == wanted)

        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        stored = keep & (place < num_points)
        at = points + shape * num_points + place
        tl.store(at, x, mask=stored)
        tl.store(at + num_shapes * num_points, y, mask=stored)
        tl.store(at + 2 * num_shapes * num_points, z, mask=stored)
        count += tl.sum(keep.to(tl.int32), 0)
        if start < TRIAL:
            kept = count
        start += CANDIDATES
    tl.store(found + shape, tl.where(kept < least_kept, -1, tl.minimum(count, num_points)))


def most_shapes(num_points: int) -> int:
    """How many shapes a launch may make."""
    return max(1, min(_MOST_SHAPES, _MOST_POINTS // num_points))


def sample_surfaces(
    tables: dict[str, torch.Tensor], num_points: int, least_kept: int, most_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        tables: of the shapes, from [`shape_tables`][jointmae_hf.data.procedural.shape_tables], on a GPU.
        num_points: points of each.
        least_kept: a shape that keeps fewer of its first candidates gets no points.
        most_candidates: after so many none are drawn.

    Returns:
        float32 `(3, shapes, num_points)`; and int32 `(shapes,)`, how many points of each there are, -1 for none.
    """
    tests = tables["tests"]  # (primitives, numbers, shapes, 1)
    num_shapes = tests.shape[2]
    points = tests.new_empty(3, num_shapes, num_points)
    found = tests.new_empty(num_shapes, dtype=torch.int32)
    _launch(
        _sample_surface,
        num_shapes,
        points,
        found,
        tables["key"],
        tables["entries"],
        tables["patches"],
        tables["frames"],
        tests,
        tables["adds"],
        tables["tolerance"],
        tables["slots"],
        num_shapes,
        num_points,
        least_kept,
        most_candidates,
        tables["patches"].shape[1],
        tables["frames"].shape[1],
        NUMBERS=tests.shape[1],
        TRIAL=procedural._TRIAL,
        CANDIDATES=CANDIDATES,
        num_warps=WARPS,
    )
    return points, found
