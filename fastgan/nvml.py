"""What an NVIDIA device does while a program runs on it: NVML read by a thread in the background."""

import statistics
import threading
import time
from types import ModuleType
from typing import Any

import torch


class Unavailable(Exception):
    """There is nothing to read; the message says why, in one line."""


READINGS = {
    "utilisation_percent": lambda nvml, h: nvml.nvmlDeviceGetUtilizationRates(h).gpu,
    "power_watts": lambda nvml, h: nvml.nvmlDeviceGetPowerUsage(h) / 1000,
    "clock_mhz": lambda nvml, h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_MEM),
    "temperature_celsius": lambda nvml, h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU),
    "memory_mib": lambda nvml, h: nvml.nvmlDeviceGetMemoryInfo(h).used >> 20,
}


def connect(device: torch.device) -> tuple[ModuleType, Any]:
    """(pynvml, handle of `device`), to be ended by nvmlShutdown. Raises Unavailable."""
    if device.type != "cuda" or torch.version.hip:
        raise Unavailable(f"NVML: {device} is no NVIDIA device; no power, clocks or temperature")
    import pynvml  # here: only machines with a driver gain from it

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # NVML counts unlike CUDA
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        raise Unavailable(f"NVML: {error}; no power, clocks or temperature") from None


def driver(device: torch.device) -> str:
    """The driver's version, or why it is not known."""
    try:
        nvml, _ = connect(device)
    except Unavailable as error:
        return str(error)
    try:
        return str(nvml.nvmlSystemGetDriverVersion())
    finally:
        nvml.nvmlShutdown()


class Sampler:
    """Reads the device every `interval` seconds between enter and exit. Raises Unavailable when made."""

    def __init__(self, device: torch.device, interval: float = 0.05):
        self.nvml, self.handle = connect(device)
        self.interval = interval
        self.samples: dict[str, list[float]] = {name: [] for name in READINGS}
        self.seconds = self.joules = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="nvml", daemon=True)

    def __enter__(self) -> "Sampler":
        self._energy, self._start = millijoules(self.nvml, self.handle), time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start
        after = millijoules(self.nvml, self.handle)
        if self._energy is not None and after is not None:
            self.joules = (after - self._energy) / 1000
        elif self.samples["power_watts"]:  # no energy counter before Volta
            self.joules = statistics.mean(self.samples["power_watts"]) * self.seconds
        self.nvml.nvmlShutdown()

    def summary(self, images: int) -> dict[str, Any]:
        """{reading: {mean, max}} of what this device can tell, seconds, joules and joules an image."""
        figures: dict[str, Any] = {
            name: {"mean": round(statistics.mean(values), 1), "max": round(max(values), 1)}
            for name, values in self.samples.items()
            if values
        }
        figures |= {"seconds": round(self.seconds, 3), "joules": round(self.joules, 1)}
        return figures | {"joules_per_image": round(self.joules / images, 4)}

    def _sample(self) -> None:
        while True:
            for name, read in READINGS.items():
                try:
                    self.samples[name].append(read(self.nvml, self.handle))
                except self.nvml.NVMLError:  # this device cannot tell
                    continue
            if self._stop.wait(self.interval):
                return


class Meter:
    """Power since it was last read, from the device's energy counter; nothing where there is none."""

    def __init__(self, device: torch.device):
        self.nvml: ModuleType | None = None
        try:
            self.nvml, self.handle = connect(device)
        except Unavailable:
            return
        self.last = time.perf_counter(), millijoules(self.nvml, self.handle)

    def read(self) -> dict[str, float]:
        """{"power_watts": mean since the last reading}, or nothing."""
        if self.nvml is None:
            return {}
        (then, before), self.last = self.last, (time.perf_counter(), millijoules(self.nvml, self.handle))
        now, after = self.last
        if before is None or after is None:
            return {}
        return {"power_watts": round((after - before) / 1000 / (now - then), 1)}


def millijoules(nvml: ModuleType, handle: Any) -> int | None:
    """That the device has used since its driver was loaded; None if it does not count."""
    try:
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None
