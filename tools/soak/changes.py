"""What changes the library: adding, updating, removing, renaming; and what must come of it."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tools.soak.mounting import Mount, Readers
from tools.soak.runner import Child, Runner, SoakError
from tools.soak.shelf import Shelf
from tools.soak.sources import KINDS, SourceMaker, Version

__all__ = ["Changer", "check_model", "parse_sums"]

_MODELS_MIN, _MODELS_MAX = 8, 26
_BYTES_MAX = 120_000_000
"""Of the models at one time; versions that readers hold come on top."""

_KILLED = 0.3
"""Share of commands that are disturbed."""

_ESCAPED = {b"n": b"\n", b"r": b"\r", b"\\": b"\\"}

_Argument = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a command makes of a model; None where there is no such model."""

    name: str
    before: Version | None
    after: Version | None


def stored_sums(runner: Runner, name: str) -> dict[bytes, str] | None:
    """SHA-256 of every file of a model, decoded; None if there is no such model.

    Raises:
        SoakError: It cannot be decoded.
    """
    result = runner.run("verify MODEL", "verify", name, "--sha256sum", allowed=(0, 1))
    if result.status == 0:
        return parse_sums(result.output)
    if "has no model named" in result.errors:
        return None
    raise SoakError(f"verify {name} failed:\n{result.errors}")


def parse_sums(output: bytes) -> dict[bytes, str]:
    """What `sha256sum -c` would read: digests by path."""
    return dict(map(_parse_sum, output.splitlines()))


def _parse_sum(line: bytes) -> tuple[bytes, str]:
    # A leading backslash says that the name is escaped.
    escaped = line.startswith(b"\\")
    digest, path = line.removeprefix(b"\\").split(b"  ", 1)
    if escaped:
        path = re.sub(rb"\\(.)", lambda found: _ESCAPED[found[1]], path)
    return path, digest.decode()


def check_model(runner: Runner, name: str, version: Version) -> None:
    """Decode a model and compare it.

    Raises:
        SoakError: It is not this version.
    """
    found = stored_sums(runner, name)
    if found != version.sums:
        raise SoakError(_difference(name, found, [version]))


def _difference(name: str, found: dict[bytes, str] | None, wanted: Sequence[Version | None]) -> str:
    lines = [f"{name} is not what it must be: it has {found}"]
    lines += [f"allowed: {version and version.sums}" for version in wanted]
    return "\n".join(lines)


class Changer:
    """Changes models at random; one for each thread.

    Args:
        runner: Runs commands.
        shelf: The oracle; what it says is what the commands made of it.
        maker: Makes models.
        readers: Starts readers beside changes.
        mount: What they read through.
        chosen: Chooses.
        hand_over: Takes readers that go on after a change, and what to do when they ended.
    """

    def __init__(
        self,
        runner: Runner,
        shelf: Shelf,
        maker: SourceMaker,
        readers: Readers,
        mount: Mount,
        chosen: random.Random,
        hand_over: Callable[[Child, str, list[Version]], None],
    ) -> None:
        self._runner = runner
        self._shelf = shelf
        self._maker = maker
        self._readers = readers
        self._mount = mount
        self._chosen = chosen
        self._hand_over = hand_over

    def run(self) -> None:
        """Change one thing after the other, until the soak ends."""
        while not self._runner.stopping.is_set():
            self._choose()()
            time.sleep(self._chosen.random() * 0.5)

    def _choose(self) -> Callable[[], None]:
        models = self._shelf.models()
        if len(models) < _MODELS_MIN:
            return self.add
        if len(models) > _MODELS_MAX or self._shelf.size > _BYTES_MAX:
            return self.remove_models
        actions = {
            self.add: 6,
            self.update: 3,
            self.add_into: 3,
            self.remove_models: 3,
            self.remove_files: 2,
            self.move: 2,
        }
        return self._chosen.choices(list(actions), list(actions.values()))[0]

    # --- the changes

    def add(self) -> None:
        """New models: one by its name, or several by the names of their directories."""
        several = self._chosen.random() < 0.2
        versions = [self._make() for _ in range(2 if several else 1)]
        if several:
            names = [version.directory.name for version in versions]
            self._shelf.take_names(names)
        else:
            names = [self._shelf.take_new(self._chosen)]
        outcomes = [
            _Outcome(name, None, version) for name, version in zip(names, versions, strict=True)
        ]
        by_name = dict(zip(names, versions, strict=True))
        if not several and self._chosen.random() < 0.2:
            self._add_and_remove_source(outcomes[0], versions[0])
            return

        def arguments(left: Iterable[str]) -> list[_Argument]:
            paths = [by_name[name].directory for name in left]
            return ["add", *paths, *([] if several else ["--name", names[0]])]

        self._change("add", outcomes, arguments)

    def _add_and_remove_source(self, outcome: _Outcome, version: Version) -> None:
        copy = version.directory.with_name(f"{version.directory.name}-copy")
        shutil.copytree(version.directory, copy, copy_function=os.link)

        def arguments(_: Iterable[str]) -> list[_Argument]:
            return ["add", copy, "--name", outcome.name, "--remove-source"]

        try:
            self._change("add --remove-source", [outcome], arguments, again=False)
            if outcome.name not in self._shelf.models():
                left = Version.of(copy)
                if left.sums != version.sums:
                    raise SoakError(f"{copy} lost files that are in no model: {left.sums}")
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def update(self) -> None:
        """A model becomes what a directory is now."""
        for name in self._shelf.take(self._chosen):
            old = self._shelf.models()[name]
            new = self._maker.change(old, self._chosen)
            more = self._chosen.choice(([], ["--checksum"]))
            self._change(
                "add --update",
                [_Outcome(name, old, new)],
                lambda _, name=name, new=new, more=more: [
                    *("add", new.directory, "--name", name, "--update"),
                    *more,
                ],
            )

    def add_into(self) -> None:
        """A model gets more files."""
        for name in self._shelf.take(self._chosen):
            old = self._shelf.models()[name]
            new, folder, paths = self._maker.grow(old, self._chosen)
            target = f"{name}/{folder}" if folder else name
            self._change(
                "add --into",
                [_Outcome(name, old, new)],
                lambda _, target=target, paths=paths: ["add", *paths, "--into", target],
            )

    def remove_models(self) -> None:
        """Models go: each as a whole, not all at one time."""
        names = self._shelf.take(self._chosen, self._chosen.randint(1, 3))
        if names:
            models = self._shelf.models()
            outcomes = [_Outcome(name, models[name], None) for name in names]
            self._change("rm", outcomes, lambda left: ["rm", *left])

    def remove_files(self) -> None:
        """A model loses files."""
        for name in self._shelf.take(self._chosen):
            old = self._shelf.models()[name]
            gone = set(self._chosen.sample(sorted(old.sums), min(2, len(old.sums) - 1)))
            if not gone:
                self._shelf.give_back([name])
                continue
            new = self._maker.shrink(old, gone, self._chosen)
            targets = [f"{name}/{os.fsdecode(path)}" for path in sorted(gone)]
            self._change(
                "rm FILE", [_Outcome(name, old, new)], lambda _, targets=targets: ["rm", *targets]
            )

    def move(self) -> None:
        """A model gets another name."""
        for name in self._shelf.take(self._chosen):
            version = self._shelf.models()[name]
            new = self._shelf.take_new(self._chosen)
            self._change(
                "mv",
                [_Outcome(name, version, None), _Outcome(new, None, version)],
                lambda _, name=name, new=new: ["mv", name, new],
                together=True,
            )

    def _make(self) -> Version:
        with self._shelf.shared(self._chosen) as other:
            return self._maker.make(
                self._chosen.choice(KINDS), self._chosen, other[1] if other else None
            )

    # --- what must come of them

    def _change(
        self,
        action: str,
        outcomes: list[_Outcome],
        arguments: Callable[[Iterable[str]], list[_Argument]],
        *,
        together: bool = False,
        again: bool = True,
    ) -> None:
        """Run a command on models that are taken, find out what it did, and give them back.

        Args:
            action: What it is counted as.
            outcomes: What it makes of them.
            arguments: Of the command, for the models that are still as they were.
            together: Whether all change at one moment.
            again: Whether to run it again where it was killed before it was done.
        """
        kept = [v for o in outcomes for v in (o.before, o.after) if v is not None]
        for version in kept:
            self._shelf.keep(version)
        try:
            beside = self._read_beside(outcomes)
            names = [outcome.name for outcome in outcomes]
            disturb = self._chosen if self._chosen.random() < _KILLED else None
            result = self._runner.run(action, *arguments(names), disturb=disturb)
            if result.ended_by is None:
                self._all_done(outcomes)
            else:
                left = self._settle(outcomes, together=together)
                if left and again and self._chosen.random() < 0.7:
                    # What was interrupted succeeds when it is run again.
                    self._runner.run(action, *arguments(left))
                    self._runner.count("run again after a kill")
                    self._all_done([o for o in outcomes if o.name in left])
            self._finish_beside(beside)
        finally:
            self._shelf.give_back([outcome.name for outcome in outcomes])
            for version in kept:
                self._shelf.drop(version)

    def _all_done(self, outcomes: list[_Outcome]) -> None:
        for outcome in outcomes:
            self._shelf.set(outcome.name, outcome.after)
            if self._chosen.random() < 0.2:
                self._check(outcome)
            if outcome.after is None and self._chosen.random() < 0.3:
                child = self._readers.start("gone", self._mount, outcome.name, [], self._chosen, 0)
                self._readers.finish(child, self._mount, "gone")

    def _check(self, outcome: _Outcome) -> None:
        found = stored_sums(self._runner, outcome.name)
        if found != (outcome.after.sums if outcome.after else None):
            raise SoakError(_difference(outcome.name, found, [outcome.after]))

    def _settle(self, outcomes: list[_Outcome], *, together: bool) -> list[str]:
        """Find out which models are as they were; the oracle takes over what is."""
        before = []
        for outcome in outcomes:
            found = stored_sums(self._runner, outcome.name)
            if found == (outcome.before.sums if outcome.before else None):
                before.append(outcome.name)
                continue
            if found != (outcome.after.sums if outcome.after else None):
                raise SoakError(_difference(outcome.name, found, [outcome.before, outcome.after]))
            self._shelf.set(outcome.name, outcome.after)
        if together and len(before) not in (0, len(outcomes)):
            raise SoakError(f"half done: only {before} of {outcomes} are as they were")
        return before

    def _read_beside(self, outcomes: list[_Outcome]) -> list[tuple[Child, str, list[Version]]]:
        """Readers of the first model while it changes."""
        outcome = outcomes[0]
        started = []
        if outcome.before is not None and self._chosen.random() < 0.3:
            seconds = self._chosen.random() * 8
            versions = [outcome.before]
            child = self._readers.start(
                "hold", self._mount, outcome.name, versions, self._chosen, seconds
            )
            self._runner.wait_for_word(child, f"a reader that opens {outcome.name}")
            started.append((child, "hold", versions))
        if self._chosen.random() < 0.2:
            versions = [v for v in (outcome.before, outcome.after) if v is not None]
            seconds = 1 + self._chosen.random() * 3
            child = self._readers.start(
                "race", self._mount, outcome.name, versions, self._chosen, seconds
            )
            started.append((child, "race", versions))
        return started

    def _finish_beside(self, started: list[tuple[Child, str, list[Version]]]) -> None:
        for child, mode, versions in started:
            if mode == "hold":
                child.say("go\n")
            if mode == "race":
                # The model must stay as it is until it has ended.
                self._readers.finish(child, self._mount, mode)
            else:
                self._hand_over(child, mode, versions)
