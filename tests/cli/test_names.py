import pytest

from fragfs.cli.names import Target, files_below, parse_target
from fragfs.errors import NotFoundError, UsageError

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


def test_a_directory_stands_for_the_files_below_it():
    paths = [b"a", b"onnx/m", b"onnx/x/y", b"onnx2/m"]
    assert files_below(Target(b"m", b"onnx"), paths) == [b"onnx/m", b"onnx/x/y"]
    assert files_below(Target(b"m", b"a"), paths) == [b"a"]
    assert files_below(Target(b"m", b""), paths) == paths
    assert files_below(Target(b"m", b""), []) == []


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(NotFoundError, match="model 'm' has no file 'onn'"):
        files_below(Target(b"m", b"onn"), [b"onnx/m"])
