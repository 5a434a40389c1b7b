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
