"""Batches made and moved to a GPU while the step before them runs."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from queue import Empty, Full, Queue
from typing import Any

import torch

from ..data.collation import move_batch


_PATIENCE = 0.2  # seconds after which a waiting thread looks whether it is still wanted


def prefetch(
    batches: Iterable[tuple[dict[str, torch.Tensor], Any]], device: torch.device, depth: int
) -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    """
    The same batches, on a device.

    A thread takes them and, on a GPU, moves them by a stream of its own, from pinned memory without waiting. What
    makes the batches runs in that thread and on that stream too. With a depth of 0 there is neither.

    Args:
        batches: each with something that goes along.
        device: where the model is.
        depth: batches that are ready ahead of time, 0 or more.

    Raises:
        Exception: what `batches` raises, at the place of the batch that is missing.
    """
    if depth == 0:
        for batch, rest in batches:
            yield move_batch(batch, device), rest
        return

    ready: Queue = Queue(depth)
    stopped = threading.Event()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(item: Any):
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=_PATIENCE)
            except Full:
                continue

    def work():
        try:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                for batch, rest in batches:
                    batch = move_batch(batch, device)
                    put((batch, rest, None if stream is None else stream.record_event()))
                    if stopped.is_set():
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=_PATIENCE)
            except Empty:  # a signal is handled between two waits
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            batch, rest, event = item
            if event is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(event)
                for tensor in batch.values():
                    tensor.record_stream(current)
            yield batch, rest
    finally:
        stopped.set()
        thread.join()
