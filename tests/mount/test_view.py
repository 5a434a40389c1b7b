from fragfs.library.tree import Directory
from fragfs.mount.view import TreeView, join_path
from tests.reader.fakes import FakeLibrary


def library():
    fake = FakeLibrary()
    for model in (b"org/one", b"org/two", b"other", b"organ/x"):
        fake.add(model, b"sub/f", b"data")
    return fake


def names(view, path):
    entries = view.list_directory(path)
    return None if entries is None else [name for name, _ in entries]


def test_without_models_everything_is_shown():
    view = TreeView(library())
    assert names(view, b"") == [b"org", b"organ", b"other"]
    assert names(view, b"org") == [b"one", b"two"]
    assert view.lookup(b"other/sub/f").size == 4
    assert view.lookup(b"nothing") is None
    assert view.list_directory(b"other/sub/f") is None


def test_one_model_with_the_folders_above_it():
    view = TreeView(library(), (b"org/one",))
    assert names(view, b"") == [b"org"]
    assert names(view, b"org") == [b"one"]
    assert names(view, b"org/one/sub") == [b"f"]
    assert isinstance(view.lookup(b"org"), Directory)
    for hidden in (b"org/two", b"organ", b"other/sub/f", b"org/one2"):
        assert view.lookup(hidden) is None
        assert view.list_directory(hidden) is None


def test_several_models():
    view = TreeView(library(), (b"org/two", b"other"))
    assert names(view, b"") == [b"org", b"other"]
    assert names(view, b"org") == [b"two"]


def test_join_path():
    assert join_path(b"", b"a") == b"a"
    assert join_path(b"a", b"b") == b"a/b"
