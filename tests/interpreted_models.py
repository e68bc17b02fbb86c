"""The models' golden numbers once more, computed by the kernels in Triton's interpreter."""

import os

import pytest
from test_models import (  # noqa: F401
    test_conv2d,
    test_dcgan,
    test_fully_connected,
    test_normalize_2nd_moment,
    test_synthesis_layer,
    test_torgb,
)


@pytest.fixture(autouse=True)
def _interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"
