import pytest

from fragfs.cli.names import Target, is_below, parse_target
from fragfs.errors import UsageError

MODELS = {b"plain", b"org/name", b"org/name-2", b"caf\xe9"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("plain", Target(b"plain", b"")),
        ("plain/", Target(b"plain", b"")),
        ("plain/a/b", Target(b"plain", b"a/b")),
        ("org/name", Target(b"org/name", b"")),
        ("org/name-2/x", Target(b"org/name-2", b"x")),
        ("org", None),
        ("org/nam", None),
        ("/plain", None),
        ("caf\udce9/x", Target(b"caf\xe9", b"x")),
    ],
)
def test_the_longest_model_name_that_is_a_prefix_wins(argument, expected):
    assert parse_target(argument, MODELS) == expected


@pytest.mark.parametrize("argument", ["", "/", "//"])
def test_an_argument_must_name_something(argument):
    with pytest.raises(UsageError, match="names no model"):
        parse_target(argument, MODELS)


def test_what_lies_below_a_directory():
    paths = [b"a", b"onnx/m", b"onnx/x/y", b"onnx2/m"]
    assert [path for path in paths if is_below(path, b"onnx")] == [b"onnx/m", b"onnx/x/y"]
    assert [path for path in paths if is_below(path, b"a")] == [b"a"]
    assert [path for path in paths if is_below(path, b"")] == paths
