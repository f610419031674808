"""The pages keep up with the code: verbs, rooms, commands and links."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(
            page
            for folder in ("docs", "bench", "projects")
            for page in (ROOT / folder).rglob("*.md")
        ),
    ]
)
PROJECT = ROOT / "projects/diorama"
ROOMS = sorted(path.parent.name for path in (ROOT / "src/skyloom").glob("*/__init__.py"))
DECISION_LINES = 60


def text(name: str) -> str:
    """A page of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def targets() -> set[str]:
    """The words that make knows."""
    return set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))


def test_every_verb_and_option_is_documented():
    place = importlib.util.spec_from_file_location("write_cli", ROOT / "docs/write_cli.py")
    assert place
    assert place.loader
    writer = importlib.util.module_from_spec(place)
    place.loader.exec_module(writer)
    assert set(writer.PAGES) == {"skyloom", "diorama"}
    for program, page in writer.PAGES.items():
        assert page.read_text(encoding="utf-8") == writer.reference(program), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    content = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", content) if "://" not in link
    ]
    dead = [link for link in links if link and not (page.parent / link).exists()]
    assert not dead, f"{page.name} points nowhere: {dead}"


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md"])
def test_every_room_is_on_the_map(page: str):
    content = text(page)
    assert ROOMS
    assert not (
        unnamed := [room for room in ROOMS if not re.search(rf"(skyloom/|`){room}\b", content)]
    ), unnamed


def test_readme_shows_two_commands_that_make_knows():
    block = re.search(r"```bash\n(.*?)```", text("README.md"), re.DOTALL)
    assert block
    words = re.findall(r"^make (\w+)", block.group(1), re.MULTILINE)
    assert words == ["video", "test"]
    assert set(words) <= targets()


def test_pages_name_only_targets_that_exist():
    named = {
        word
        for page in PAGES
        for word in re.findall(r"`make (\w+)", page.read_text(encoding="utf-8"))
    }
    assert named <= targets(), named - targets()


def test_pages_name_only_files_that_exist():
    pattern = r"\b((?:recipes|tests|bench|examples|docs)/[\w/.-]+\.(?:py|toml|json|txt|md))"
    dead = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        for name in re.findall(pattern, page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists() and not (PROJECT / name).exists()
    }
    assert not dead, dead


def test_the_architecture_page_has_a_current_tree():
    place = importlib.util.spec_from_file_location("write_tree", ROOT / "docs/write_tree.py")
    assert place
    assert place.loader
    writer = importlib.util.module_from_spec(place)
    place.loader.exec_module(writer)
    assert text("ARCHITECTURE.md") == writer.page(), "run `make docs`"


def test_pages_name_only_modules_that_exist():
    packages = "api|queue|storage|workers|cli|core|data|diffusion|evaluate|generate|media|models"
    pattern = rf"\b((?:serve/)?(?:{packages}|safety|serve|train|world)/[\w/]+\.py)\b"
    roots = (ROOT, ROOT / "src/skyloom", ROOT / "tests", PROJECT / "src/diorama", PROJECT)
    dead = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        if page.name not in ("log.md", "CHANGELOG.md") and "results" not in page.parts
        for name in re.findall(pattern, page.read_text(encoding="utf-8"))
        if not any((root / name).exists() for root in roots)
    }
    assert not dead, dead


def test_decision_pages_are_numbered_and_short():
    decisions = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [
        f"{index:04d}" for index in range(1, len(decisions) + 1)
    ]
    assert not [
        path.name
        for path in decisions
        if len(path.read_text("utf-8").splitlines()) > DECISION_LINES
    ]


def test_every_call_of_the_server_is_documented():
    from skyloom.serve.api.app import create_app

    calls = [
        (method.upper(), path, "".join(call["security"][0]["key"] if "security" in call else []))
        for path, item in create_app().openapi()["paths"].items()
        for method, call in item.items()
    ]
    listed = re.findall(
        r"^\| `(GET|POST|DELETE) (\S+)` \| ?(\w*) \|", text("docs/server.md"), re.MULTILINE
    )
    assert sorted(listed) == sorted(calls)


def test_every_setting_of_the_server_is_documented():
    from dataclasses import fields

    from skyloom.serve.settings import Settings

    table = text("docs/server.md").split("## Settings")[1].split("## ")[0]
    keys = {
        key
        for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", row)
    }
    assert keys == {field.name for field in fields(Settings)}
