"""What README, CHANGELOG and `make help` say is so."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import fragfs
from fragfs.cli.diagnosing import LOADERS
from fragfs.cli.main import COMMANDS, cli
from fragfs.types import Level, LibraryConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()

PUBLIC_NAMES = set(
    "FragmentLibrary Fragment FragmentId FragmentMetadata FragmentType LayerMapping TensorRef"
    " ModelManifest LibraryConfig LibraryStats LIBRARY_FORMAT_VERSION Level AddOptions"
    " EstimateReport Explanation GcReport OptimizeReport FragmentSignature SignatureConfig"
    " SimilarityIndex SimilarityMatch SimilarityThreshold DEFAULT_SIMILARITY_THRESHOLD"
    " FragmentError FormatError IntegrityError LimitError NotFoundError StorageError"
    " UsageError".split()
)

FOREIGN_OPTIONS = {
    "--keep",  # of tools/demo.py
    "--large",  # of tools/bench
    "--section",  # of tools/bench
    "--read-mib",  # of tools/bench
    "--rounds",  # of tools/bench
    # vLLM and SGLang
    "--safetensors-load-strategy",
    "--weight-loader-prefetch-checkpoints",
    "--weight-loader-disable-mmap",
    "--only-values",  # of getfattr
}


def command_options(name):
    command = cli.get_command(click.Context(cli), name)
    return {
        flag
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


def all_options():
    group = {
        flag for parameter in cli.params for flag in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}
    return group.union(*map(command_options, COMMANDS))


def code_of(markdown):
    """Everything in the document that is set as code: blocks, fences and spans."""
    fences = re.findall(r"^```.*?^```", markdown, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^(?: {4}.*\n)+", markdown, re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", markdown)
    return "\n".join([*fences, *blocks, *spans])


def test_every_command_the_readme_names_exists():
    named = set(re.findall(r"\bfragfs (?:--library \S+ )?([a-z]+)\b", code_of(README)))
    assert named - COMMANDS.keys() == set()
    assert COMMANDS.keys() - named == set(), "the README does not name every command"


def test_every_option_the_readme_names_exists():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code_of(README)))
    assert named - all_options() - FOREIGN_OPTIONS == set()


def test_the_table_of_commands_names_their_own_options():
    rows = re.findall(r"^\| `fragfs ([a-z]+)[^|]*\|([^|]*)\|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == COMMANDS.keys()
    for name, description in rows:
        named = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", description))
        assert named - command_options(name) == set(), name


def test_the_table_of_levels_has_every_level():
    rows = re.findall(r"^\| `(\w+)`(?:, the default)? \|", README, re.MULTILINE)
    assert [Level[name.upper()] for name in rows] == [Level.FAST, Level.BALANCED, Level.SMALL]
    assert f"`{LibraryConfig().level.name.lower()}`, the default" in README


def test_the_readme_states_the_default_closure():
    assert f"`closure_max`, {LibraryConfig().closure_max} by default" in README


def test_the_json_commands_are_those_the_readme_names():
    sentence = re.search(r"Scripts: (.*?) have `--json`", README, re.DOTALL).group(1)
    named = set(re.findall(r"`([a-z]+)`", sentence))
    assert named == {name for name in COMMANDS if "--json" in command_options(name)}


def test_the_advice_for_loaders_is_that_of_doctor():
    advice = re.search(r"^## Advice for loaders\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    for loader, setting, _ in LOADERS:
        if loader == "any":
            continue
        assert loader in advice.group(1)
        assert "=" not in setting or f"`{setting}`" in advice.group(1)


def test_the_changelog_has_the_current_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert fragfs.__version__ == version
    newest = re.search(r"^## (\S+)$", CHANGELOG, re.MULTILINE).group(1)
    assert newest == version


def test_the_package_has_no_other_attributes_by_magic():
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        fragfs.missing  # noqa: B018 - the access is the test


def test_the_prelude_exports_exactly_the_public_names():
    import fragfs.prelude as prelude

    assert set(prelude.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(prelude, name) is not None


def test_the_python_example_compiles_and_imports_public_names():
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    imported = {
        alias.name
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.ImportFrom) and node.module == "fragfs.prelude"
        for alias in node.names
    }
    assert imported
    assert imported <= PUBLIC_NAMES


def test_links_into_the_project_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README + CHANGELOG):
        assert (ROOT / target).exists(), target


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target_the_readme_names():
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    targets = set(re.findall(r"^ *make ([a-z-]+)", listed, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", code_of(README)))
    assert {"demo", "test", "check", "help"} <= named <= targets


def test_the_makefile_runs_programs_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    programs = set(re.findall(r"\b(tools/\w+\.\w+)", makefile))
    for name in re.findall(r"-m tools\.(\w+)", makefile):
        package = ROOT / "tools" / name / "__main__.py"
        programs.add(f"tools/{name}/__main__.py" if package.exists() else f"tools/{name}.py")
    assert {"tools/demo.py", "tools/bench/__main__.py"} <= programs
    assert {program for program in programs if not (ROOT / program).exists()} == set()


@pytest.mark.slow
@pytest.mark.mount
def test_the_demo_keeps_its_promise():
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--synthetic"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("tensors equal, SHA-256 of 2 files equal") == 7
    for what in ("copies in other precisions", "similar pieces", "mixtures of two pieces"):
        assert f"by differences to {what}" in done.stdout
    assert "predicted from\n" in done.stdout
    assert done.stdout.endswith("Every tensor and every byte came back identical.\n")
