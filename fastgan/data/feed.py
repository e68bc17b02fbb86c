"""Batches without end, drawn by a shuffle that has no state."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from fastgan.data.images import ImageSet

Batch = tuple[torch.Tensor, torch.Tensor | None]  # images and labels
Sent = tuple[Batch, Any]  # and the event of its arrival, None on a CPU


class Feed:
    """Batches on `device`, the i-th image ever drawn a function of (seed, i) alone.

    Every image is drawn once in each epoch of len(images) draws; a batch may straddle epochs. With
    `mirror`, half of the draws are flipped left to right.

    A resident set lies on the device whole. Otherwise a thread gathers the batch after the last one while
    the caller computes, and sends it to a GPU on a stream of its own. `resident=None` decides: resident if
    the set takes at most half of the device's free memory. On the CPU a mapped set is never copied, only
    read.
    """

    def __init__(
        self,
        images: ImageSet,
        device: torch.device,
        seed: int = 0,
        mirror: bool = False,
        resident: bool | None = None,
    ):
        self.device = device
        self.mirror = mirror
        self.count = len(images)
        self.epoch = lru_cache(maxsize=2)(partial(shuffled, self.count, seed))
        self.resident = fits(images.images.nbytes, device) if resident is None else resident
        # Rows are whole images, [N, H, W, C]: gathering copies them in one piece, and a batch of them is
        # channels_last already. No copy is made of a set that the loaders laid out.
        self.rows = images.images.permute(0, 2, 3, 1).contiguous()
        self.labels = images.labels
        if self.resident:
            self.rows = self.rows.to(device)
            self.labels = None if self.labels is None else self.labels.to(device)
        self.side = SideStream(device) if device.type == "cuda" and not self.resident else None
        self.thread = ThreadPoolExecutor(1, "feed")  # starts with the first task
        self.ahead: tuple[tuple[int, int, int], Future[Sent]] | None = None

    def batch(self, start: int, count: int, every: int = 1) -> Batch:
        """Draws start, start + every, ...: uint8 [count, C, H, W] in channels_last, labels int64 [count].

        Rank r of n takes its share of the draws from `start` on by batch(start + r, count / n, n).
        """
        if self.rows.device.type != "cpu":
            rows, labels = self.select(start, count, every)
        elif self.resident:
            rows, labels = self.gather(start, count, every)
        else:
            (rows, labels), arrival = self.foreseen(start, count, every)
            if self.side:
                self.side.receive(rows, labels, arrival)
        return rows.permute(0, 3, 1, 2), labels

    def close(self) -> None:
        """Stop the thread. A streaming feed gives no batch after this."""
        self.thread.shutdown(cancel_futures=True)

    def draws(self, start: int, count: int, every: int = 1) -> np.ndarray:
        """int64 [2, count]: which image each draw takes, and whether it is flipped."""
        parts, count = [], count * every
        while count > 0:
            epoch, offset = divmod(start, self.count)
            parts.append(self.epoch(epoch)[:, offset : offset + count])
            start += parts[-1].shape[1]
            count -= parts[-1].shape[1]
        return np.concatenate(parts, axis=1)[:, ::every]

    def select(self, start: int, count: int, every: int = 1) -> Batch:
        """Rows uint8 [count, H, W, C] and labels of a set on an accelerator, without waiting for it."""
        draws = self.pin(torch.from_numpy(self.draws(start, count, every))).to(self.device, non_blocking=True)
        rows = self.rows.index_select(0, draws[0])
        if self.mirror:
            rows = torch.where(draws[1].bool().view(-1, 1, 1, 1), rows.flip(2), rows)
        return rows, None if self.labels is None else self.labels.index_select(0, draws[0])

    def gather(self, start: int, count: int, every: int = 1) -> Batch:
        """Rows uint8 [count, H, W, C] and labels of a set in host memory, in memory that nobody else holds.

        NumPy, because torch would spread these small copies over its workers, and waking those takes
        longer than the copies on busy cores; in the thread they would also be a second set of workers.
        PyTorch hands out pinned memory again only after the copies from it have ended.
        """
        which, flips = self.draws(start, count, every)
        pinned = self.device.type == "cuda"
        batch = torch.empty((count, *self.rows.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        rows = batch.numpy()
        # mode "clip": with "raise", NumPy copies twice. Draws are in range.
        np.take(self.rows.numpy(), which, axis=0, out=rows, mode="clip")
        if self.mirror:
            flipped = np.flatnonzero(flips)
            rows[flipped] = np.take(rows[flipped], np.arange(rows.shape[2])[::-1], axis=2)
        labels = None if self.labels is None else self.pin(torch.from_numpy(self.labels.numpy()[which]))
        return batch, labels

    def send(self, start: int, count: int, every: int = 1) -> Sent:
        """What `gather` returns, on its way to the device."""
        rows, labels = self.gather(start, count, every)
        return self.side.send(rows, labels) if self.side else ((rows, labels), None)

    def foreseen(self, start: int, count: int, every: int = 1) -> Sent:
        """What `send` returns, from the thread if it foresaw this request; then sets it to the next."""
        wanted, future = self.ahead or (None, None)
        following = (start + count * every, count, every)
        if future is not None and wanted == (start, count, every):
            sent = future.result()
        else:
            if future is not None:
                future.cancel()
            sent = self.send(start, count, every)
        self.ahead = following, self.thread.submit(self.send, *following)
        return sent

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in pinned memory if the device is a GPU: from other memory a copy to it would wait."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


class PairFeed:
    """Two domains as one feed: the i-th pair is the i-th draw of `a` and that of `b`, two shuffles.

    Give the feeds different seeds: of two forms of the same images, equal seeds would draw true pairs. Their
    lengths may differ; each has its own epochs.
    """

    def __init__(self, a: Feed, b: Feed):
        self.a, self.b = a, b
        self.count = max(a.count, b.count)

    def batch(self, start: int, count: int, every: int = 1) -> Batch:
        """Draws start, start + every, ... : uint8 [count, 2C, H, W] in channels_last, without labels."""
        (a, _), (b, _) = self.a.batch(start, count, every), self.b.batch(start, count, every)
        return torch.cat([a, b], dim=1), None

    def close(self) -> None:
        """Stop both threads."""
        self.a.close()
        self.b.close()


class SideStream:
    """Copies to a GPU on a stream of their own: they run beside what the receiver's stream computes.

    Memory is double-buffered by PyTorch's allocators: they hand a pinned block out again after the copy from
    it, and a block on the device, which belongs to the side stream, after what the receiver had asked for
    when it let the tensor go (`record_stream`).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, rows: torch.Tensor, labels: torch.Tensor | None) -> Sent:
        """Copies of pinned tensors, and the event of their arrival. No thread waits for it."""
        with torch.cuda.stream(self.stream):
            rows = rows.to(self.device, non_blocking=True, copy=True)
            labels = None if labels is None else labels.to(self.device, non_blocking=True, copy=True)
            return (rows, labels), self.stream.record_event()

    def receive(self, rows: torch.Tensor, labels: torch.Tensor | None, arrival: Any) -> None:
        """Let what the caller's stream is asked for from now on see the copies."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrival)
        rows.record_stream(stream)
        if labels is not None:
            labels.record_stream(stream)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [2, count]: a permutation of the images for one epoch, and a random bit for each draw.

    A sort of Philox's raw words, whose values NumPy has promised to keep, unlike those of
    `Generator.permutation`. The lowest bit of a word has no say in the order, so it decides the flip.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(count)
    order = np.argsort(words)
    return np.stack([order, (words[order] & 1).astype(np.int64)])


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes take at most half of the memory that is free on the device."""
    if device.type == "cuda":
        return 2 * size <= torch.cuda.mem_get_info(device)[0]
    return 2 * size <= available()


def available() -> int:
    """Bytes of the host's memory that may be taken without paging."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
    except OSError:  # not Linux; the system pages what does not fit
        return sys.maxsize
    return 1024 * int(lines["MemAvailable"].split()[0])
