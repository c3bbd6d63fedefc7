"""READMEs: what they name is there, and what is there is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ROOMS = ["engine", "adapters"]
READMES = [
    ROOT / "README.md",
    ROOT / "tools" / "README.md",
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("README.md"))),
]
MAX_BYTES = 9_000  # of the first page


def name_of(readme: Path) -> str:
    return str(readme.relative_to(ROOT))


def anchors_of(readme: Path) -> set[str]:
    """The anchors that headings get when the page is shown."""
    titles = re.findall(r"^#+ (.+)$", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def modules_beside(readme: Path) -> Iterator[Path]:
    """Modules of a room, and those of its folders that have no README of their own."""
    for path in sorted(readme.parent.iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            yield path
        elif path.is_dir() and not (path / "README.md").exists():
            yield from (each for each in path.rglob("*.py") if each.name != "__init__.py")


def test_the_first_page_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_readme(room: str) -> None:
    packages = [path for path in (ROOT / room).iterdir() if (path / "__init__.py").exists()]
    assert packages
    assert all((path / "README.md").exists() for path in packages)


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_links_lead_somewhere(readme: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", readme.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = readme.parent / file if file else readme
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), target


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_files_that_are_named_are_there(readme: Path) -> None:
    named = re.findall(r"`([\w/.]+\.(?:py|yaml|html|js))`", readme.read_text(encoding="utf-8"))
    folders = [readme.parent, *(path for path in readme.parent.iterdir() if path.is_dir()), ROOT]
    folders += [ROOT / room for room in ROOMS]
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert not missing


@pytest.mark.parametrize("readme", READMES[2:], ids=name_of)
def test_every_module_of_a_room_is_named(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    unnamed = [
        str(path.relative_to(ROOT))
        for path in modules_beside(readme)
        if not re.search(rf"`(?:[\w/]*/)?{re.escape(path.stem)}(?:\.py)?`", text)
    ]
    assert not unnamed
