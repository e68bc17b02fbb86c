"""The endless shuffle, and how its batches reach the device."""

import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from image_cases import never
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.data import Feed, ImageSet, feed, load_images

CPU = torch.device("cpu")


def numbered(count: int, channels: int = 3, labels: bool = True) -> ImageSet:
    """Images that tell which they are (pixel 0, 0) and whether they are flipped (the last column is 255)."""
    images = torch.zeros(count, 8, 8, channels, dtype=torch.uint8)
    images[:, 0, :7, 0] = torch.arange(count, dtype=torch.uint8)[:, None]
    images[:, :, 7] = 255
    labels_ = torch.arange(count) * 10 if labels else None
    return ImageSet(images.permute(0, 3, 1, 2), labels_, (), "numbered")


def which(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 4].tolist()


def flipped(images: torch.Tensor) -> list[bool]:
    return (images[:, 0, 5, 0] == 255).tolist()


BOTH = pytest.mark.parametrize("resident", [True, False])


@BOTH
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_what_it_says(resident: bool, channels: int):
    images = numbered(50, channels)
    batch, labels = Feed(images, CPU, resident=resident).batch(0, 16)
    assert batch.shape == (16, channels, 8, 8) and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert labels is not None and labels.dtype == torch.int64
    assert labels.tolist() == [10 * i for i in which(batch)]
    assert torch.equal(batch, images.images[which(batch)])
    assert Feed(numbered(50, labels=False), CPU, resident=resident).batch(0, 16)[1] is None


@BOTH
def test_each_epoch_is_a_new_permutation(resident: bool):
    drawn = Feed(numbered(50), CPU, resident=resident)
    epochs = [which(drawn.batch(50 * i, 50)[0]) for i in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(50)]}) == 5


@BOTH
@pytest.mark.parametrize("mirror", [False, True])
def test_a_draw_depends_on_seed_and_place_alone(resident: bool, mirror: bool):
    def make(seed=3):
        return Feed(numbered(50), CPU, seed, mirror, resident)

    whole, labels = make().batch(0, 230)
    resumed = make()
    for start, count in [
        (225, 5),
        (7, 32),
        (39, 32),
        (71, 32),
        (0, 1),
        (49, 2),
        (103, 127),
        (39, 32),
        (10**12, 3),
    ]:
        batch, classes = resumed.batch(start, count)
        if start < 230:
            assert torch.equal(batch, whole[start : start + count])
            assert classes is not None and labels is not None
            assert torch.equal(classes, labels[start : start + count])
    assert not torch.equal(make(seed=4).batch(0, 230)[0], whole)
    far = make().batch(10**12, 3)[0]
    assert torch.equal(far, batch)


def test_the_shuffle_is_the_same_for_ever():
    order, flips = feed.shuffled(10, seed=1, epoch=2)
    assert order.tolist() == [2, 0, 9, 5, 7, 1, 6, 4, 8, 3]
    assert flips.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 0, 0]


def test_orders_of_epochs_and_seeds_are_unrelated():
    seen = {tuple(feed.shuffled(20, seed, epoch)[0]) for seed in range(20) for epoch in range(20)}
    assert len(seen) == 400
    first = np.bincount([feed.shuffled(10, 0, epoch)[0][0] for epoch in range(2000)], minlength=10)
    assert first.min() > 140 and first.max() < 260


@BOTH
def test_mirror_flips_half_of_the_draws(resident: bool):
    images = numbered(200)
    batch, _ = Feed(images, CPU, mirror=True, resident=resident).batch(0, 1000)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    flips = torch.tensor(flipped(batch))
    assert 430 < int(flips.sum()) < 570
    upright = torch.where(flips.view(-1, 1, 1, 1), batch.flip(3), batch)
    assert torch.equal(upright, images.images[which(upright)])
    per_image = torch.zeros(200).index_add(0, torch.tensor(which(upright)), flips.float())
    assert per_image.min() < 5 and per_image.max() > 0 and per_image.unique().numel() > 3
    assert not any(flipped(Feed(images, CPU, resident=resident).batch(0, 1000)[0]))


def test_only_two_epochs_are_kept():
    drawn = Feed(numbered(10), CPU)
    drawn.batch(0, 55)
    assert drawn.epoch.cache_info().currsize == 2
    misses = drawn.epoch.cache_info().misses
    for start in (42, 48, 44):
        drawn.batch(start, 6)
    assert drawn.epoch.cache_info().misses == misses


def test_streaming_takes_the_batch_that_the_thread_gathered(monkeypatch: pytest.MonkeyPatch):
    streamed = Feed(numbered(50), CPU, resident=False)
    asked = []
    gather = streamed.gather
    monkeypatch.setattr(streamed, "gather", lambda *request: asked.append(request) or gather(*request))
    for i in range(5):
        streamed.batch(8 * i, 8)
    streamed.close()
    assert asked[:5] == [(8 * i, 8, 1) for i in range(5)], "each gathered once"


@pytest.mark.parametrize("resident", [True, False])
def test_ranks_share_out_the_draws(resident: bool):
    """Rank r of 3 takes every third draw, across epochs and from its own thread's foresight."""
    whole = Feed(numbered(20), CPU, mirror=True).batch(0, 60)[0]
    for rank in range(3):
        feed = Feed(numbered(20), CPU, mirror=True, resident=resident)
        shares = [feed.batch(12 * i + rank, 4, 3)[0] for i in range(5)]
        feed.close()
        assert torch.equal(torch.cat(shares), whole[rank::3])


def test_streamed_batches_are_not_overwritten():
    streamed, resident = (Feed(numbered(50), CPU, mirror=True, resident=r) for r in (False, True))
    batches = [streamed.batch(8 * i, 8)[0] for i in range(20)]
    assert torch.equal(torch.cat(batches), resident.batch(0, 160)[0])


def test_an_error_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch):
    streamed = Feed(numbered(50), CPU, resident=False)
    streamed.batch(0, 8)
    streamed.close()
    streamed = Feed(numbered(50), CPU, resident=False)
    monkeypatch.setattr(streamed, "ahead", ((0, 8, 1), streamed.thread.submit(never)))
    with pytest.raises(AssertionError, match="decoded again"):
        streamed.batch(0, 8)


def test_a_streaming_process_ends_by_itself():
    code = """if True:
        import torch
        from fastgan.data import Feed, load_images
        feed = Feed(load_images("digits", 8), torch.device("cpu"), resident=False)
        feed.batch(0, 8)
        """
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_residence_is_decided_by_free_memory(monkeypatch: pytest.MonkeyPatch):
    assert feed.fits(1000, CPU) and not feed.fits(1 << 60, CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    cuda = torch.device("cuda", 0)
    assert feed.fits(500, cuda) and not feed.fits(501, cuda)
    assert Feed(numbered(5), CPU).resident
    monkeypatch.setattr(feed, "fits", lambda size, device: size < 5 * 3 * 64)
    assert not Feed(numbered(5), CPU).resident and Feed(numbered(4), CPU).resident
    assert Feed(numbered(5), CPU, resident=True).resident


@BOTH
def test_images_are_not_copied_on_the_cpu(resident: bool):
    images = numbered(50)
    assert Feed(images, CPU, resident=resident).rows.data_ptr() == images.images.data_ptr()
    plain = ImageSet(images.images.contiguous(), images.labels, (), "plain layout")
    expected, got = (Feed(x, CPU, resident=resident).batch(0, 99)[0] for x in (images, plain))
    assert torch.equal(expected, got)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_resident_batch_never_waits_for_the_device():
    # Meta tensors have no values: anything that reads one raises.
    batch, labels = Feed(numbered(50), torch.device("meta"), mirror=True, resident=True).batch(40, 20)
    assert batch.device.type == "meta" and batch.shape == (20, 3, 8, 8)
    assert labels is not None and labels.device.type == "meta"


class Stream:
    """Stands in for a CUDA stream: work is a queue that `run` empties up to an event still to come."""

    def __init__(self):
        self.queue: list[Event | Callable[[], None]] = []

    def run(self) -> None:
        while self.queue and (not isinstance(self.queue[0], Event) or self.queue[0].happened):
            work = self.queue.pop(0)
            if not isinstance(work, Event):
                work()

    def record_event(self) -> "Event":
        event = Event()
        self.queue.append(event.happen)
        return event

    def wait_event(self, event: "Event") -> None:
        self.queue.append(event)


class Event:
    happened = False

    def happen(self) -> None:
        self.happened = True


class Machine(TorchDispatchMode):
    """Stands in for a device with two streams and an allocator, while `sending` a batch by the side stream.

    A copy is queued; memory holds 99 until it happens. A block that a tensor lets go is 99 again: at once,
    for the next tensor of the side stream may get it, but after the work so far of a stream that the tensor
    was recorded on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.caller, self.side = Stream(), Stream()
        self.seen: list[np.ndarray] = []
        self.users: dict[int, Stream] = {}
        self.blocks: dict[int, np.ndarray] = {}
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.caller)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.record(tensor, stream))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten._to_copy.default and kwargs and kwargs["non_blocking"]
        source = args[0].numpy()
        block = np.full_like(source, 99)
        self.side.queue.append(lambda: np.copyto(block, source))
        tensor = torch.from_numpy(block)
        self.blocks[tensor.data_ptr()] = block
        weakref.finalize(tensor.untyped_storage(), self.free, tensor.data_ptr())
        return tensor

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        self.users[tensor.data_ptr()] = stream

    def free(self, pointer: int) -> None:
        block, user = self.blocks.pop(pointer), self.users.pop(pointer, None)
        if user:
            user.queue.append(lambda: block.fill(99))
        else:
            block.fill(99)

    def use(self, tensor: torch.Tensor) -> None:
        """The caller's stream is asked to read the tensor."""
        block = self.blocks[tensor.data_ptr()]
        self.caller.queue.append(lambda: self.seen.append(block.copy()))


@pytest.mark.parametrize("late", ["side", "caller"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_side_stream_is_waited_for_and_keeps_its_hands_off(
    late: str, labels: bool, monkeypatch: pytest.MonkeyPatch
):
    """Whichever stream lags behind, the caller's work sees the batches that it was asked to work on."""
    machine = Machine(monkeypatch)
    streamed = Feed(numbered(50, labels=labels), CPU, mirror=True, resident=False)
    streamed.side = feed.SideStream(CPU)
    for i in range(8):
        batch, classes = streamed.batch(8 * i, 8)
        machine.use(batch)
        if classes is not None:
            machine.use(classes)
        (machine.caller if late == "side" else machine.side).run()
        del batch, classes
    streamed.close()
    machine.side.run()
    machine.caller.run()
    expected, classes = Feed(numbered(50, labels=labels), CPU, mirror=True).batch(0, 64)
    rows = machine.seen[::2] if labels else machine.seen
    assert (np.concatenate(rows) == expected.permute(0, 2, 3, 1).numpy()).all()
    if classes is not None:
        assert (np.concatenate(machine.seen[1::2]) == classes.numpy()).all()


@pytest.mark.gpu
def test_a_slow_caller_gets_its_batches():
    """On a device: batches are let go long before the caller's stream comes to read them."""
    images, cuda = numbered(50), torch.device("cuda", 0)
    streamed, seen = Feed(images, cuda, mirror=True, resident=False), []
    for i in range(20):
        batch, labels = streamed.batch(16 * i, 16)
        torch.cuda._sleep(10_000_000)
        assert labels is not None
        seen.append((batch.clone(), labels.clone()))
    streamed.close()
    expected, classes = Feed(images, CPU, mirror=True).batch(0, 320)
    assert torch.equal(torch.cat([batch for batch, _ in seen]).cpu(), expected)
    assert classes is not None
    assert torch.equal(torch.cat([labels for _, labels in seen]).cpu(), classes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_cuda_gives_the_same_batches_without_a_sync(resident: bool):
    images, cuda = numbered(50), torch.device("cuda", 0)
    on_cpu = Feed(images, CPU, mirror=True)
    on_cuda = Feed(images, cuda, mirror=True, resident=resident)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [on_cuda.batch(16 * i, 16) for i in range(40)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, (batch, labels) in enumerate(batches):
        expected, classes = on_cpu.batch(16 * i, 16)
        assert batch.device == cuda and batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.cpu(), expected)
        assert labels is not None and classes is not None
        assert torch.equal(labels.cpu(), classes)


def test_a_small_batch_takes_well_under_a_millisecond():
    drawn = Feed(load_images("digits", 32), CPU, mirror=True, resident=True)
    times = []
    for i in range(300):
        begin = time.perf_counter()
        drawn.batch(32 * i, 32)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[150] < 1e-3
