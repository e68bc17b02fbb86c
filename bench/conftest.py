import torch


def pytest_report_header() -> list[str]:
    if torch.cuda.is_available():
        return []
    return ["kernels: no GPU, so no triton column: the time that Triton's interpreter takes means nothing"]
