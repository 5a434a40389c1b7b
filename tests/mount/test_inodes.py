from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.library.tree import Directory, File
from fragfs.mount.inodes import DIRECTORY_INODE_MIN, ROOT_INODE, InodeTable


def directory(mtime_ns=1):
    return Directory(mtime_ns, None)


def file(content, size=10):
    return File(content, size, 5, b"m")


def table_with_model():
    table = InodeTable(directory())
    root = table.get(ROOT_INODE)
    return table, root, table.remember(root, b"m", directory())


def test_files_are_numbered_by_content_and_directories_from_above():
    table, root, model = table_with_model()
    assert table.remember(model, b"f", file(1024)).number == 1024
    assert model.number >= DIRECTORY_INODE_MIN
    assert table.remember(root, b"n", directory()).number == model.number + 1
    assert table.number_of(b"", directory()) == ROOT_INODE


def test_a_directory_keeps_its_number_for_the_life_of_the_mount():
    table, root, model = table_with_model()
    number = model.number
    table.forget(number, 1)
    assert table.get(number) is None
    assert table.remember(root, b"other", directory()).number != number
    assert table.remember(root, b"m", directory()).number == number


def test_an_inode_lives_until_its_last_lookup_is_taken_back():
    table, _, model = table_with_model()
    table.remember(model, b"a", file(1024))
    table.remember(model, b"b", file(1024))
    table.remember(model, b"a", file(1024))
    table.forget(1024, 2)
    assert table.get(1024).path == b"m/a"
    table.forget(1024, 1)
    assert table.get(1024) is None
    assert [known.names for known in table.known_directories()] == [{b"m": model.number}, {}]


def test_the_root_cannot_be_forgotten():
    table, _, _ = table_with_model()
    table.forget(ROOT_INODE, 10**6)
    assert table.get(ROOT_INODE) is not None


def test_a_name_that_changes_hands_stays_with_the_new_inode():
    table, _, model = table_with_model()
    table.remember(model, b"f", file(1024))
    table.remember(model, b"f", file(1025))
    table.drop_name(model.number, b"f", 1024)
    assert table.known_directories()[1].names == {b"f": 1025}
    table.forget(1024, 1)
    assert table.known_directories()[1].names == {b"f": 1025}
    table.drop_name(model.number, b"f", 1025)
    assert table.known_directories()[1].names == {}
    assert table.get(1025) is not None


def test_what_is_removed_still_has_its_attributes():
    table, _, model = table_with_model()
    table.remember(model, b"f", file(1024, size=77))
    table.drop_name(model.number, b"f", 1024)
    assert table.get(1024).node.size == 77


def test_known_directories_are_copies():
    table, _, model = table_with_model()
    known = table.known_directories()
    table.remember(model, b"f", file(1024))
    assert known[1].names == {}
    assert known[1].mtime_ns == 1


NAMES = st.sampled_from([b"a", b"b", b"c"])
STEPS = st.one_of(
    st.tuples(st.just("remember"), NAMES, st.integers(1024, 1027)),
    st.tuples(st.just("forget"), st.integers(1024, 1027), st.integers(1, 3)),
    st.tuples(st.just("drop"), NAMES, st.integers(1024, 1027)),
)


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=40))
def test_names_are_known_exactly_while_their_inode_is(steps):
    """Against a model that keeps lookup counts and a dict of names."""
    table, _, model = table_with_model()
    counts, names = Counter(), {}
    for kind, one, two in steps:
        if kind == "remember":
            table.remember(model, one, file(two))
            counts[two] += 1
            names[one] = two
        elif kind == "forget":
            taken = min(two, counts[one])
            if taken:
                table.forget(one, taken)
                counts[one] -= taken
                if not counts[one]:
                    names = {name: number for name, number in names.items() if number != one}
        else:
            table.drop_name(model.number, one, two)
            if names.get(one) == two:
                del names[one]
    assert table.known_directories()[1].names == names
    assert {n for n in range(1024, 1028) if table.get(n)} == {n for n in counts if counts[n]}
