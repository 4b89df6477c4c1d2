"""Training data from several sources at once, by weight: tables of clouds, and procedural shapes without end.

A mixture is a sequence of samples numbered from 0. Which source a number falls on, and which of its clouds, is a
function of (seed, number): of every `BLOCK` numbers each source gets its share exactly, in an order of their own. So
there is nothing to save but the step, and any number of processes sees the same samples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from .augmentation import ORDER, counter_generator, normalize_clouds
from .collation import VIEW_NAMES, PreTrainingCollator, move_batch, split_batch
from .loading import PointClouds, check_column, load_point_clouds, load_point_dataset
from .procedural import HAS_KERNEL, finish_clouds, procedural_clouds, shape_tables, surface_points
from .procedural_recipes import RECIPE, VERSION, draw_recipes


PROCEDURAL = "procedural"
BLOCK = 1000
# Fewer procedural shapes at a time cost more each, more do not cost less.
_SHAPES_AT_ONCE = 64


class CloudSource(Protocol):
    """An endless sequence of clouds that can be entered anywhere."""

    def take(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The clouds, each `(n, 3)`, that come at these places of the sequence."""

    def fingerprint(self) -> dict[str, int]:
        """Tells sequences apart by content."""


class ShuffledClouds:
    """
    The clouds of a table, pass after pass, each pass in an order keyed by (seed, pass, key).

    Args:
        clouds: the table.
        seed: seed of the run.
        key: sets tables of a run apart, 1 or more.
    """

    def __init__(self, clouds: PointClouds, seed: int, key: int):
        self.clouds = clouds
        self.seed = seed
        self.key = key
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(self, numbers: Sequence[int]) -> list[np.ndarray]:
        passes = [divmod(int(number), len(self.clouds)) for number in numbers]
        return [self.clouds[self._permutation(epoch)[place]] for epoch, place in passes]

    def fingerprint(self) -> dict[str, int]:
        return self.clouds.fingerprint()

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, counter_generator(self.seed, ORDER, epoch, self.key).permutation(len(self.clouds)))
        return self._order[1]


class ProceduralClouds:
    """
    The procedural shapes of a seed, one after the other.

    Args:
        num_points: points of each cloud.
        seed: which sequence of shapes.
    """

    def __init__(self, num_points: int, seed: int):
        self.num_points = num_points
        self.seed = seed

    def take(self, numbers: Sequence[int]) -> list[np.ndarray]:
        return list(procedural_clouds(numbers, self.num_points, self.seed).numpy())

    def fingerprint(self) -> dict[str, int]:
        return {"version": VERSION, "seed": self.seed}


class MixedBatches(Dataset):
    """
    The batches of one process over a mixture, as a table: item `n` is the `n`-th batch since the run began.

    Several items are made in one go, see [`batches_at_once`].

    Args:
        sources: the sources by name.
        weights: the share of each, in any unit.
        collator: makes the batches.
        batch_size, num_processes, process_index, accumulation: as for
            [`EpochBatches`][jointmae_hf.data.collation.EpochBatches].
        deferred: whether procedural shapes stay recipes, for [`finish_batch`] to make them on a GPU, which the
            processes that prepare batches must not touch.

    Raises:
        ValueError: if `batch_size` does not divide evenly, or a source has less than one of `BLOCK` samples.
    """

    def __init__(
        self,
        sources: Mapping[str, CloudSource],
        weights: Mapping[str, float],
        collator: PreTrainingCollator,
        batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation: int = 1,
        deferred: bool = False,
    ):
        self.part_size = split_batch(batch_size, num_processes, accumulation)
        self.deferred = deferred
        self.sources = list(sources.values())
        self.shares = block_shares({name: weights[name] for name in sources})
        self.collator = collator
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.accumulation = accumulation

    def samples(self, number: int) -> np.ndarray:
        """The numbers in the mixture of the samples in the `number`-th batch of this process."""
        step, part = divmod(number, self.accumulation)
        start = step * self.batch_size + (part * self.num_processes + self.process_index) * self.part_size
        return np.arange(start, start + self.part_size)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample of the mixture, and its place in the sequence of that source."""
        blocks, places = np.divmod(samples, BLOCK)
        source, place = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks):
            generator = counter_generator(self.collator.seed, ORDER, int(block))
            order = generator.permutation(np.repeat(np.arange(len(self.shares)), self.shares))
            rank = np.empty_like(order)
            for number, share in enumerate(self.shares):
                rank[order == number] = block * share + np.arange(share)
            rows = blocks == block
            source[rows], place[rows] = order[places[rows]], rank[places[rows]]
        return source, place

    @property
    def batches_at_once(self) -> int:
        """How many batches are best made in one go."""
        return max(1, _SHAPES_AT_ONCE // self.part_size)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], None]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[dict[str, Any], None]]:
        samples = np.concatenate([self.samples(number) for number in numbers])
        source, place = self.locate(samples)
        clouds: list[Any] = [None] * len(samples)
        recipes = np.empty(len(samples), dtype=RECIPE)
        for which in np.unique(source):
            rows, clouds_of = np.flatnonzero(source == which), self.sources[which]
            if self.deferred and isinstance(clouds_of, ProceduralClouds):
                recipes[rows] = draw_recipes(place[rows], clouds_of.seed)
                taken = [np.arange(clouds_of.num_points, dtype=np.int32)] * len(rows)
            else:
                taken = clouds_of.take(place[rows])
            for row, cloud in zip(rows, taken, strict=True):
                clouds[row] = cloud
        keys = [(0, int(sample)) for sample in samples]
        parts = [slice(i, i + self.part_size) for i in range(0, len(samples), self.part_size)]
        make = self._deferred_batch if self.deferred else lambda clouds, keys, _: self.collator(clouds, keys)
        return [(make(clouds[part], keys[part], recipes[part]), None) for part in parts]

    def _deferred_batch(
        self, clouds: list[np.ndarray], keys: list[tuple[int, int]], recipes: np.ndarray
    ) -> dict[str, Any]:
        views, inputs = self.collator.draw(clouds, keys)
        is_recipe = np.array([cloud.ndim == 1 for cloud in clouds])
        batch = {"inputs": inputs, "is_recipe": torch.from_numpy(is_recipe), "views": []}
        batch["recipes"] = torch.from_numpy(recipes[is_recipe].view(np.uint8))
        batch["tables"] = shape_tables(recipes[is_recipe]) if HAS_KERNEL and is_recipe.any() else None
        for view in views:
            arrays = {"points": normalize_clouds(view.points), "numbers": view.numbers}
            arrays |= {"matrix": view.matrix.astype(np.float32), "shift": view.shift.astype(np.float32)}
            if view.jitter is not None:
                arrays["jitter"] = view.jitter
            batch["views"].append({name: torch.from_numpy(array) for name, array in arrays.items()})
        return batch

    def fingerprint(self) -> list[dict[str, Any]]:
        """Tells mixtures apart by content."""
        sources = zip(self.sources, self.shares, strict=True)
        return [{"share": share / BLOCK, **source.fingerprint()} for source, share in sources]


def finish_batch(batch: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Makes the procedural shapes of a deferred batch on a device, and the inputs of the model from them."""
    recipes = batch["recipes"].numpy().view(RECIPE)
    # What the views take: fewer points of a shape are the beginning of more.
    num_points = 1 + max(int(view["numbers"].numpy().max(initial=0)) for view in batch["views"])
    surfaces = surface_points(recipes, num_points, device, batch["tables"])  # (3, shapes, points)
    inputs, is_recipe = move_batch(batch["inputs"], device), batch["is_recipe"].to(device)
    views = [move_batch(view, device) for view in batch["views"]]
    for name, view in zip(VIEW_NAMES, views, strict=False):
        points = view["points"].new_empty(len(is_recipe), *view["points"].shape[1:])
        points[~is_recipe] = view["points"]
        points[is_recipe] = finish_clouds(recipes, surfaces.gather(2, view["numbers"].long().expand(3, -1, -1)))
        # Not as a matrix product, which might be rounded to less than float32.
        inputs[name] = (points[:, :, None] * view["matrix"][:, None]).sum(3).add_(view["shift"][:, None])
        if "jitter" in view:
            inputs[name] += view["jitter"]
    return inputs


def parse_mixture(text: str) -> dict[str, float]:
    """
    Sources and weights of `NAME:WEIGHT,...`, such as `"procedural:0.8,org/shapes:0.2"`; without `:WEIGHT` it is 1.
    Spaces around names and weights do not count.

    Raises:
        ValueError: if there is no source, one has no name or is named twice, or a weight is not a positive number.
    """
    weights: dict[str, float] = {}
    for item in (item.strip() for item in text.split(",") if item.strip()):
        name, separator, weight = item.rpartition(":")
        try:
            name, value = (name.strip(), float(weight)) if separator else (item, 1.0)
        except ValueError:  # a colon of the name's own
            name, value = item, 1.0
        if not name:
            raise ValueError(f"`train_data` has the item {item!r}, expected NAME:WEIGHT.")
        if name in weights:
            raise ValueError(f"`train_data` names {name!r} twice.")
        if not 0 < value < math.inf:
            raise ValueError(f"`train_data` gives {name!r} the weight {value}, expected a positive number.")
        weights[name] = value
    if not weights:
        raise ValueError(f"`train_data` is {text!r}, expected NAME:WEIGHT,...")
    return weights


def block_shares(weights: Mapping[str, float]) -> list[int]:
    """
    Samples of each source in a block of `BLOCK`, in proportion to the weights, by largest remainders.

    Raises:
        ValueError: if one has none.
    """
    exact = np.array(list(weights.values()), dtype=np.float64)
    exact *= BLOCK / exact.sum()
    shares = np.floor(exact + 1e-9).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: BLOCK - shares.sum()]] += 1
    for name, share in zip(weights, shares, strict=True):
        if share == 0:
            raise ValueError(
                f"the weight of {name!r} is {weights[name]}, expected at least 1 / {BLOCK} of all weights."
            )
    return shares.tolist()


def open_sources(
    names: Sequence[str],
    num_points: int,
    seed: int,
    split: str = "train",
    points_column: str = "points",
    config_name: str | None = None,
) -> dict[str, CloudSource]:
    """
    The sources of a mixture.

    Args:
        names: `"procedural"`, or what [`load_point_dataset`][jointmae_hf.data.loading.load_point_dataset] opens.
        num_points: points of procedural clouds.
        seed: seed of the run.
        split, points_column, config_name: of the data sets.

    Raises:
        ValueError: as [`load_point_clouds`][jointmae_hf.data.loading.load_point_clouds].
    """
    sources: dict[str, CloudSource] = {}
    for key, name in enumerate(names, start=1):
        if name == PROCEDURAL:
            sources[name] = ProceduralClouds(num_points, seed)
        else:
            dataset = load_point_dataset(name, split, config_name=config_name)
            check_column(dataset, points_column)
            sources[name] = ShuffledClouds(load_point_clouds(dataset, points_column), seed, key)
    return sources
