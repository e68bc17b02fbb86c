import gc
from pathlib import Path

import pytest
import torch


def pytest_report_header() -> list[str]:
    if torch.cuda.is_available():
        return []
    return ["kernels: no GPU, so no triton column: the time that Triton's interpreter takes means nothing"]


@pytest.fixture(autouse=True)
def _own_peak():
    """The peak of memory that a benchmark reports is its own, not that of one before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if (marks := Path("/proc/self/clear_refs")).exists():
        marks.write_text("5")  # proc(5): the peak of the resident set starts anew
