"""The house rules on imports, held by parsing every module (not by running them).

Function-level imports and those under TYPE_CHECKING count as well: a layer that is broken for
type checkers only is still broken for readers.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fragfs"

LEVELS = {
    "": 0,
    "errors": 1,
    "types": 2,
    "formats": 3,
    "codec": 3,
    "similarity": 3,
    "library": 4,
    "cache": 4,
    "reader": 5,
    "mount": 6,
    "cli": 7,
    "prelude": 8,
    "__main__": 8,
}
"""Rooms and how high they are: a room imports from lower rooms and from itself."""

PYFUSE3_ROOMS = {"mount"}
TRIO_ROOMS = {"reader", "mount", "cli"}
ENVIRONMENT_ROOMS = {"cli"}
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


@dataclass
class Module:
    """A parsed module: its imports as (line, dotted name), and where it uses the environment."""

    name: str
    imports: list[tuple[int, str]] = field(default_factory=list)
    environment_lines: list[int] = field(default_factory=list)

    @property
    def room(self) -> str:
        return [*self.name.split("."), ""][1]


def parse_package(files: dict[str, str]) -> list[Module]:
    """Parse `files`: paths below the package ("cli/main.py") to source text."""
    packages = {_module_name(path) for path in files if path.endswith("/__init__.py")}
    names = {_module_name(path) for path in files}
    return [_parse(path, source, names, packages) for path, source in files.items()]


def _module_name(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(["fragfs", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _parse(path: str, source: str, names: set[str], packages: set[str]) -> Module:
    name = _module_name(path)
    module = Module(name)
    package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
    os_aliases = {"os"}
    tree = ast.parse(source, path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            module.imports += [(node.lineno, alias.name) for alias in node.names]
            os_aliases |= {
                alias.asname for alias in node.names if alias.name == "os" and alias.asname
            }
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, package)
            for alias in node.names:
                dotted = f"{origin}.{alias.name}"
                # Packages are empty: what is imported from one must be a module of it.
                is_module = dotted in names or origin in packages
                module.imports.append((node.lineno, dotted if is_module else origin))
            if origin == "os" and ENVIRONMENT_NAMES & {alias.name for alias in node.names}:
                module.environment_lines.append(node.lineno)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ENVIRONMENT_NAMES
            and isinstance(node.value, ast.Name)
            and node.value.id in os_aliases
        ):
            module.environment_lines.append(node.lineno)
    return module


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def find_violations(modules: list[Module]) -> list[str]:
    """Every broken rule, as `module:line: what`."""
    by_name = {module.name: module for module in modules}
    return [
        f"{module.name}:{line}: {what}"
        for module in modules
        for line, what in _broken_rules(module, by_name)
    ] + [f"import cycle: {' > '.join(cycle)}" for cycle in find_cycles(by_name)]


def _broken_rules(module: Module, by_name: dict[str, Module]) -> Iterator[tuple[int, str]]:
    room = module.room
    if room not in LEVELS:
        yield 0, f"room {room!r} has no level"
        return
    for line, target in module.imports:
        top = target.partition(".")[0]
        if top == "pyfuse3" and room not in PYFUSE3_ROOMS:
            yield line, "imports pyfuse3"
        if top == "trio" and room not in TRIO_ROOMS:
            yield line, "imports trio"
        if top != "fragfs":
            continue
        if target not in by_name:
            yield line, f"imports {target}, which is no module"
            continue
        other = by_name[target].room
        if other != room and LEVELS.get(other, 0) >= LEVELS[room]:
            yield line, f"imports {target}, which is not below it"
    if room not in ENVIRONMENT_ROOMS:
        for line in module.environment_lines:
            yield line, "reads the environment"


def find_cycles(by_name: dict[str, Module]) -> list[list[str]]:
    """One cycle per module that closes one, found depth first."""
    done: set[str] = set()
    path: list[str] = []
    cycles: list[list[str]] = []

    def visit(name: str) -> None:
        if name in path:
            cycle = path[path.index(name) :]
            start = cycle.index(min(cycle))
            cycles.append([*cycle[start:], *cycle[:start], min(cycle)])
            return
        if name in done:
            return
        path.append(name)
        for _, target in by_name[name].imports:
            if target in by_name:
                visit(target)
        path.pop()
        done.add(name)

    for name in sorted(by_name):
        visit(name)
    return cycles


def test_the_house_holds():
    files = {
        str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert {"cli/main.py", "types.py", "errors.py"} <= files.keys()
    # A compiled module imports nothing of the package.
    compiled = (path.relative_to(PACKAGE).with_suffix(".py") for path in PACKAGE.rglob("*.c"))
    files |= {str(path): "" for path in compiled}
    assert find_violations(parse_package(files)) == []


def test_package_initializers_hold_no_code():
    for path in PACKAGE.glob("*/__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) <= 1, f"{path} has more than a docstring"


HOUSE = {
    "__init__.py": "",
    "errors.py": "",
    "types.py": "from fragfs.errors import UsageError",
    "codec/__init__.py": "",
    "codec/planes.py": "from fragfs.types import Dtype",
    "formats/__init__.py": "",
    "formats/gguf.py": "",
    "library/__init__.py": "",
    "library/catalog.py": "import os\nfrom fragfs.codec import planes\nos.stat('.')",
    "library/add.py": "from fragfs.library.catalog import Catalog",
    "cache/__init__.py": "",
    "cache/memory.py": "",
    "reader/__init__.py": "",
    "reader/fetch.py": "import trio\nimport fragfs.library.catalog",
    "mount/__init__.py": "",
    "mount/operations.py": "import pyfuse3, trio\nfrom fragfs.reader.fetch import Fetcher",
    "cli/__init__.py": "",
    "cli/main.py": "import os\nos.environ['HOME']\nfrom fragfs.mount.operations import serve",
    "prelude.py": "from fragfs.library.add import AddOptions",
    "__main__.py": "from fragfs.cli.main import main",
}


def test_a_sound_house_has_no_violations():
    assert find_violations(parse_package(HOUSE)) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("types.py", "from fragfs.library.catalog import Catalog", "not below it"),
        ("types.py", "import fragfs.codec.planes", "not below it"),
        ("codec/planes.py", "from fragfs.formats.gguf import parse", "not below it"),
        ("library/catalog.py", "from fragfs.cache.memory import Cache", "not below it"),
        ("cache/memory.py", "from fragfs.library.catalog import Catalog", "not below it"),
        ("reader/fetch.py", "from ..mount import operations", "not below it"),
        ("mount/operations.py", "from fragfs.prelude import FragmentLibrary", "not below it"),
        (
            "codec/planes.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fragfs.reader.fetch",
            "not below it",
        ),
        ("codec/planes.py", "def f():\n    from fragfs.cli import main", "not below it"),
        ("library/catalog.py", "from fragfs.types import Dtype\nimport trio.lowlevel", "trio"),
        ("cache/memory.py", "async def f():\n    from trio import sleep", "trio"),
        ("reader/fetch.py", "import pyfuse3", "pyfuse3"),
        ("cli/main.py", "from pyfuse3 import FUSEError", "pyfuse3"),
        ("library/add.py", "import os\nx = os.environ.get('X')", "environment"),
        ("library/add.py", "import os as system\nx = system.getenv('X')", "environment"),
        ("mount/operations.py", "from os import environb", "environment"),
        ("library/add.py", "from fragfs.library import Catalog", "no module"),
        ("library/add.py", "from fragfs.library.missing import Catalog", "no module"),
        ("attic.py", "", "no level"),
    ],
)
def test_each_broken_rule_is_found(path, source, expected):
    violations = find_violations(parse_package(HOUSE | {path: source}))
    module = path.removesuffix(".py").replace("/", ".")
    assert any(f"fragfs.{module}:" in text and expected in text for text in violations), violations


def test_cycles_are_found_and_named():
    broken = HOUSE | {
        "library/catalog.py": "def f():\n    from fragfs.library.add import AddOptions"
    }
    assert find_violations(parse_package(broken)) == [
        "import cycle: fragfs.library.add > fragfs.library.catalog > fragfs.library.add"
    ]
