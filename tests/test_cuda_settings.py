"""What torch may do with float32 products on a GPU, while pycert's operators run and after; no GPU is needed."""

from __future__ import annotations

import threading

import pytest
import torch

from pycert import _C, _flags, profiling

#: Ways to allow TF32. torch's older readers throw after those of single operators, or of some of them.
WAYS = {
    "nothing": lambda: None,
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "products alone": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions forbidden": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}
PER_OPERATOR = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def settings():
    """Of products and convolutions, by whichever reader answers."""
    if PER_OPERATOR:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(params=WAYS)
def way(request):
    if not PER_OPERATOR and request.param in ("products alone", "convolutions forbidden"):
        pytest.skip("this torch has no settings of single operators")
    before = settings()
    torch.backends.cudnn.allow_tf32 = True  # as in a fresh process
    WAYS[request.param]()
    yield request.param
    if PER_OPERATOR:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    if PER_OPERATOR:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


def test_operators_exclude_tf32_and_leave_every_setting_as_it_was(way):
    before, deterministic, inside = settings(), torch.backends.cudnn.deterministic, []
    _C.testing_within_cuda_guard(lambda: inside.append((settings(), torch.backends.cudnn.deterministic)))
    ((within, always),) = inside
    assert not {"tf32", True} & set(within) and always
    assert settings() == before and torch.backends.cudnn.deterministic == deterministic


def test_a_guard_that_goes_leaves_another_threads_alone():
    """Else TF32 would come back in the middle of the other's products, whose error bounds do not cover it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    entered, left, found = threading.Event(), threading.Event(), []

    def second():
        _C.testing_within_cuda_guard(lambda: (entered.set(), left.wait(30), found.append(settings())))

    thread = threading.Thread(target=second)
    try:
        _C.testing_within_cuda_guard(lambda: (thread.start(), entered.wait(30)))
        left.set()
        thread.join()
        assert not {"tf32", True} & set(found[0])
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_settings_are_read_and_left_by_the_rest_of_pycert(way):
    before = settings()
    found = _flags.uncovered("cuda", torch.float32, True)
    assert ("TF32 matrix products" in found) == (way in ("allow_tf32", "high", "medium", "products alone"))
    assert ("TF32 convolutions" in found) == (way != "convolutions forbidden")
    with profiling._exact_products():
        assert not {"tf32", True} & {settings()[0]}
    with _flags.plain_convolutions(torch.device("cuda")):
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled and settings() == before
