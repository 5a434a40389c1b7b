import pytest

from fragfs.codec import groups
from tests.codec.families import without_kernels


@pytest.fixture(params=["compiled", "numpy"])
def kernels(request, monkeypatch):
    """Run a test with the compiled loops, and again with what stands in for them."""
    if request.param == "numpy":
        without_kernels(monkeypatch)
    elif groups._kernels is None:
        pytest.skip("fragfs.codec._kernels is not compiled here")
    return request.param


@pytest.fixture(params=["vectors", "words", "numpy"])
def loops(request, monkeypatch):
    """Run a test with the compiled loops, with those for other processors, and with numpy."""
    if request.param == "numpy":
        without_kernels(monkeypatch)
        yield request.param
        return
    if groups._kernels is None:
        pytest.skip("fragfs.codec._kernels is not compiled here")
    has_vectors = groups._kernels.allow_vectors(request.param == "vectors")
    try:
        if request.param == "vectors" and not has_vectors:
            pytest.skip("this processor has no AVX2")
        yield request.param
    finally:
        groups._kernels.allow_vectors(True)
