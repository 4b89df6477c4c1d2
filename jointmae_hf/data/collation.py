"""From clouds to the batches of pre-training.

A batch is a pure function of (seed, epoch, indices of its samples). [`EpochBatches`] says which samples the n-th batch
of a process holds, [`StreamBatches`] reads them in order from a stream; both hand them to one [`PreTrainingCollator`].
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..configuration_joint_mae import JointMAEConfig
from ..geometry_joint_mae import VIEW_AXES
from .augmentation import (
    ORDER,
    SAMPLES,
    Augmentation,
    apply_affine,
    counter_generator,
    normalize_clouds,
    subsample,
)
from .loading import PointClouds, clouds_from_arrow


# The inputs of the model that views of the samples become.
VIEW_NAMES = ("point_values", "second_point_values")
# Rows that a stream is read by when it is not shuffled: enough to make the cost of a read small.
_READ_ROWS = 256


class PreTrainingCollator:
    """
    Makes the inputs of [`JointMAEForPreTraining`] from raw clouds: subsample, normalise, augment, draw view and masks.
    Where the configuration compares views of a shape, all but view and masks is done a second time.

    The model projects the points that it is given, so the depth image is one of the augmented cloud.

    Args:
        config: says how many points, tokens and patches there are, and whether the 2D branch is dropped at times.
        augmentation: the random map of each sample.
        seed: seed of the run.
    """

    def __init__(self, config: JointMAEConfig, augmentation: Augmentation, seed: int):
        self.num_points = config.num_points
        self.num_tokens = config.num_centers[-1]
        self.num_patches = config.num_patches
        self.modality_dropout = config.modality_dropout
        self.use_image_branch = config.use_image_branch
        self.compares_views = config.agreement_loss_weight > 0
        self.augmentation = augmentation
        self.seed = seed

    def __call__(self, clouds: Sequence[np.ndarray], keys: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """
        Args:
            clouds: one `(n, 3)` array a sample, in any unit, `n` any number above 0.
            keys: (epoch, index) of each sample.

        Returns:
            `point_values`, and what the model would else draw itself: `point_noise`, and with a 2D branch `view`,
            `patch_noise` and, if the configuration has modality dropout, `image_dropped`; `second_point_values` where
            it compares views.
        """
        views, batch = self.draw(clouds, keys)
        for name, view in zip(VIEW_NAMES, views, strict=False):
            points = apply_affine(normalize_clouds(view.points), view.matrix, view.shift)
            batch[name] = torch.from_numpy(points if view.jitter is None else points + view.jitter)
        return batch

    def draw(
        self, clouds: Sequence[np.ndarray], keys: Sequence[tuple[int, int]]
    ) -> tuple[list["View"], dict[str, torch.Tensor]]:
        """
        All that is random, before the clouds are normalised and augmented.

        Args:
            clouds: as above; where a cloud is made later, the numbers of its points instead, int32 `(n,)`.
            keys: (epoch, index) of each sample.

        Returns:
            One view of the samples, or two where the configuration compares them; and the inputs of the model other
            than points.
        """
        size = len(clouds)
        num_present = sum(cloud.ndim == 2 for cloud in clouds)
        views = [
            View(size, num_present, self.num_points, self.augmentation) for _ in range(2 if self.compares_views else 1)
        ]
        projected = np.empty(size, dtype=np.int64)
        point_noise = np.empty((size, self.num_tokens), dtype=np.float32)
        patch_noise = np.empty((size, self.num_patches), dtype=np.float32)
        dropped = np.empty(size, dtype=bool)
        for row, (cloud, (epoch, index)) in enumerate(zip(clouds, keys, strict=True)):
            generator = counter_generator(self.seed, SAMPLES, epoch, index)
            views[0].draw(row, cloud, generator)
            projected[row] = generator.integers(len(VIEW_AXES))
            point_noise[row] = generator.random(self.num_tokens, dtype=np.float32)
            patch_noise[row] = generator.random(self.num_patches, dtype=np.float32)
            dropped[row] = generator.random() < self.modality_dropout
            for second in views[1:]:  # last, so that all else is what it is without a second view
                second.draw(row, cloud, generator)
        noise = {"point_noise": torch.from_numpy(point_noise)}
        if self.use_image_branch:
            noise["view"] = torch.from_numpy(projected)
            noise["patch_noise"] = torch.from_numpy(patch_noise)
            if self.modality_dropout > 0:
                noise["image_dropped"] = torch.from_numpy(dropped)
        return views, noise


def move_batch(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a batch on a device; from pinned memory without waiting."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class View:
    """
    One view of the samples of a batch: which of their points it has, and what happens to these.

    Attributes:
        points: float32 `(present, num_points, 3)`, of the samples whose cloud there is, in their order.
        numbers: int32 `(batch - present, num_points)`, of the samples whose cloud is made later: which points of it.
        matrix, shift: `(batch, 3, 3)` and `(batch, 3)`, of all samples.
        jitter: float32 `(batch, num_points, 3)`, of all samples, or `None` if the augmentation has none.
    """

    def __init__(self, size: int, num_present: int, num_points: int, augmentation: Augmentation):
        self.points = np.empty((num_present, num_points, 3), dtype=np.float32)
        self.numbers = np.empty((size - num_present, num_points), dtype=np.int32)
        self.matrix, self.shift = np.empty((size, 3, 3)), np.empty((size, 3))
        self.jitter = np.empty((size, num_points, 3), dtype=np.float32) if augmentation.max_jitter > 0 else None
        self._augmentation = augmentation
        self._filled = 0

    def draw(self, row: int, cloud: np.ndarray, generator: np.random.Generator):
        """Draws what is random for a sample. Samples come in order."""
        num_points = self.points.shape[1]
        taken = cloud[subsample(generator, len(cloud), num_points)]
        if cloud.ndim == 2:
            self.points[self._filled] = taken
            self._filled += 1
        else:
            self.numbers[row - self._filled] = taken
        self.matrix[row], self.shift[row] = self._augmentation.draw(generator)
        if self.jitter is not None:
            self.jitter[row] = self._augmentation.draw_jitter(generator, num_points)


class EpochBatches(Dataset):
    """
    The batches of one process over clouds in memory, as a table: item `n` is the `n`-th batch since the run began.

    An epoch is a permutation keyed by (seed, epoch), cut into global batches; its last incomplete one is dropped,
    which hits other samples each time. A global batch is cut into equal parts: those of the processes in the first
    accumulation step, then those of the second, and so on.

    Args:
        clouds: the data set.
        collator: makes the batches.
        batch_size: samples of an optimizer step over all processes.
        num_processes, process_index: which processes there are, and which this is.
        accumulation: batches of a process to an optimizer step.

    Raises:
        ValueError: if `batch_size` does not divide evenly, or exceeds the data set.
    """

    batches_at_once = 1

    def __init__(
        self,
        clouds: PointClouds,
        collator: PreTrainingCollator,
        batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation: int = 1,
    ):
        self.part_size = split_batch(batch_size, num_processes, accumulation)
        if batch_size > len(clouds):
            raise ValueError(f"`batch_size` is {batch_size}, but the data set has only {len(clouds)} clouds.")
        self.clouds = clouds
        self.collator = collator
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.accumulation = accumulation
        self.steps_per_epoch = len(clouds) // batch_size
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def keys(self, number: int) -> list[tuple[int, int]]:
        """(epoch, index) of each sample in the `number`-th batch of this process."""
        step, part = divmod(number, self.accumulation)
        epoch, step = divmod(step, self.steps_per_epoch)
        start = step * self.batch_size + (part * self.num_processes + self.process_index) * self.part_size
        return [(epoch, int(index)) for index in self._permutation(epoch)[start : start + self.part_size]]

    def __getitem__(self, number: int) -> tuple[dict[str, torch.Tensor], None]:
        keys = self.keys(number)
        return self.collator([self.clouds[index] for _, index in keys], keys), None

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = counter_generator(self.collator.seed, ORDER, epoch)
            self._order = (epoch, generator.permutation(len(self.clouds)))
        return self._order[1]


class StreamBatches(IterableDataset):
    """
    The batches of one process over a stream, pass after pass without end, each with the position that follows it.

    Reads blocks of `shuffle_buffer_size` rows and takes each block in an order keyed by (seed, pass, row). Unlike the
    shuffle buffer of `datasets`, a block can be read again: a position is the state of the stream at the block's start
    and the number of samples taken from it, which is exact.

    Where the shards of the stream divide among the processes each reads its own; else each reads all and keeps every
    `num_processes`-th row, and then, without shuffling, an optimizer step sees the same samples for any number of
    processes.

    Args:
        stream: a `datasets.IterableDataset`.
        points_column: the column that holds the clouds.
        collator: makes the batches.
        batch_size, num_processes, process_index, accumulation: as for [`EpochBatches`].
        shuffle_buffer_size: rows of a block; 0 or 1 keeps the order of the stream.
        position: where to begin, from an earlier run; the start if none.
    """

    def __init__(
        self,
        stream: Any,
        points_column: str,
        collator: PreTrainingCollator,
        batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation: int = 1,
        shuffle_buffer_size: int = 0,
        position: dict[str, Any] | None = None,
    ):
        from datasets.distributed import split_dataset_by_node

        self.part_size = split_batch(batch_size, num_processes, accumulation)
        self.stream = stream.select_columns([points_column]).with_format("arrow")
        if num_processes > 1:
            self.stream = split_dataset_by_node(self.stream, rank=process_index, world_size=num_processes)
        self.points_column = points_column
        self.collator = collator
        self.num_processes = num_processes
        self.process_index = process_index
        self.shuffle_buffer_size = shuffle_buffer_size
        self.position = position or {"pass": 0, "row": 0, "taken": 0, "stream": None}

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        samples = self._samples()
        while True:
            clouds, keys, positions = zip(*islice(samples, self.part_size), strict=True)
            yield self.collator(clouds, keys), positions[-1]

    def _samples(self) -> Iterator[tuple[np.ndarray, tuple[int, int], dict[str, Any]]]:
        """Each cloud with its key and the position that follows it."""
        position = self.position
        while True:
            # A stream that was given a state begins there in every later pass too, so each pass has its own copy.
            stream = copy.deepcopy(self.stream)
            if position["stream"] is not None:
                stream.load_state_dict(position["stream"])
            first_row = row = position["row"]
            for row, block, state in self._blocks(stream, first_row):
                taken = position["taken"]
                for sample in self._block_order(position["pass"], row, len(block))[taken:]:
                    taken += 1
                    index = (row + int(sample)) * self.num_processes + self.process_index
                    after = {"pass": position["pass"], "row": row, "taken": taken, "stream": state}
                    yield block[sample], (position["pass"], index), after
                position = {**position, "taken": 0}
                row += len(block)
            if row == 0:
                raise ValueError("the stream holds no rows for this process.")
            position = {"pass": position["pass"] + 1, "row": 0, "taken": 0, "stream": None}

    def _blocks(self, stream: Any, row: int) -> Iterator[tuple[int, PointClouds, dict[str, Any]]]:
        """Blocks of rows, each with the number of its first row in this process and the state that reads it again."""
        state = copy.deepcopy(stream.state_dict())
        for table in stream.iter(batch_size=max(self.shuffle_buffer_size, 1) if self._shuffles else _READ_ROWS):
            block = clouds_from_arrow(table.column(self.points_column), self.points_column, row)
            yield row, block, state
            row += len(block)
            state = copy.deepcopy(stream.state_dict())

    @property
    def _shuffles(self) -> bool:
        return self.shuffle_buffer_size > 1

    def _block_order(self, epoch: int, row: int, size: int) -> np.ndarray:
        if not self._shuffles:
            return np.arange(size)
        return counter_generator(self.collator.seed, ORDER, epoch, row + 1).permutation(size)


def split_batch(batch_size: int, num_processes: int, accumulation: int) -> int:
    """Samples of a process in one forward pass; raises `ValueError` if the global batch does not divide evenly."""
    parts = num_processes * accumulation
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"`batch_size` is {batch_size}, the samples of an optimizer step over all processes, expected a multiple "
            f"of {num_processes} process(es) x {accumulation} accumulation step(s) = {parts}."
        )
    return batch_size // parts
