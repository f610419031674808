"""Configuration files: strict loading, round trip, inheritance and overrides."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.config import dump_config, from_table, load_config, to_table
from skyloom.core.errors import ConfigError


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Part:
    name: str = "part"
    rate: float = 0.5
    limit: int | None = 3


@dataclass(frozen=True)
class Whole:
    steps: int
    part: Part = Part()
    parts: tuple[Part, ...] = ()
    maybe: Part | None = None
    pair: tuple[int, float] = (1, 2.0)
    words: tuple[str, ...] = ()
    kind: Literal["left", "right", 3] = "left"
    colour: Colour = Colour.RED
    on: bool = False
    either: int | str = 0
    folder: Path | None = None
    nested: tuple[tuple[Part, ...], ...] = field(default=((Part(),),))


PARTS = st.builds(Part, st.text(), st.floats(allow_nan=False), st.none() | st.integers())
WHOLES = st.builds(
    Whole,
    st.integers(),
    PARTS,
    st.lists(PARTS, max_size=3).map(tuple),
    st.none() | PARTS,
    st.tuples(st.integers(), st.floats(allow_nan=False)),
    st.lists(st.text(), max_size=3).map(tuple),
    st.sampled_from(["left", "right", 3]),
    st.sampled_from(Colour),
    st.booleans(),
    st.integers() | st.text(),
    st.none() | st.just(Path("runs/one")),
    st.lists(st.lists(PARTS, max_size=2).map(tuple), max_size=2).map(tuple),
)


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problem(path: Path, overrides: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, Whole, overrides)
    return caught.value


@given(WHOLES)
def test_dump_and_load_are_a_round_trip(tmp_path_factory: pytest.TempPathFactory, whole: Whole):
    path = write(tmp_path_factory.getbasetemp(), dump_config(whole))
    assert load_config(path, Whole) == whole


@given(WHOLES)
def test_to_table_and_from_table_are_a_round_trip(whole: Whole):
    assert from_table(to_table(whole), Whole, "here") == whole


def test_omitted_keys_take_defaults(tmp_path: Path):
    assert load_config(write(tmp_path, "steps = 7"), Whole) == Whole(steps=7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step = 1", ["'step'", "Did you mean 'steps'?"]),
        ("steps = 1\n[part]\nrtae = 1.0", ["part", "'rtae'", "'rate'"]),
        ("steps = 1\n[[parts]]\nnmae = 'x'", ["parts[0]", "'nmae'", "'name'"]),
        ("steps = 1\nzzzz = 1", ["'zzzz'", "Known keys: steps, part"]),
        ("on = true", ["missing 'steps'"]),
        ("steps = 1.0", ["steps", "1.0", "int"]),
        ("steps = true", ["steps", "True", "int"]),
        ("steps = '1'", ["steps", "'1'"]),
        ("steps = 1\non = 1", ["on", "bool"]),
        ("steps = 1\npart = 3", ["part", "table"]),
        ("steps = 1\nparts = 3", ["parts", "list"]),
        ("steps = 1\npair = [1]", ["pair", "2 values", "got 1"]),
        ("steps = 1\nwords = ['a', 2]", ["words[1]", "str"]),
        ("steps = 1\nkind = 'lefft'", ["kind", "Did you mean 'left'?"]),
        ("steps = 1\ncolour = 'green'", ["colour", "red, blue", "'green'"]),
        ("steps = 1\neither = 1.5", ["either", "1.5"]),
        ("steps = ", ["not valid TOML"]),
        ("base = 3", ["base", "3"]),
        ("base = 'nowhere.toml'", ["nowhere.toml", "cannot be read"]),
        ("base = 'recipe.toml'", ["inherits from itself"]),
    ],
)
def test_invalid_file_raises_with_position_and_hint(tmp_path: Path, text: str, words: list[str]):
    error = problem(write(tmp_path, text))
    assert "recipe.toml" in error.message or "nowhere.toml" in error.message
    for word in words:
        assert word in str(error)


def test_missing_and_binary_files_are_named(tmp_path: Path):
    assert "none.toml cannot be read" in str(problem(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "binary.toml is not valid TOML" in str(problem(tmp_path / "binary.toml"))


def test_inheritance_cycle_is_refused(tmp_path: Path):
    write(tmp_path, "base = 'two.toml'", "one.toml")
    assert "one.toml inherits from itself" in str(
        problem(write(tmp_path, "base = 'one.toml'", "two.toml"))
    )


def test_tables_merge_over_the_base_and_lists_are_replaced(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, "steps = 1\nwords = ['a', 'b']\n[part]\nname = 'base'\nrate = 2.0", "base.toml")
    path = write(tmp_path / "deep", "base = '../base.toml'\nwords = ['c']\n[part]\nname = 'own'")
    assert load_config(path, Whole) == Whole(1, Part("own", 2.0), words=("c",))


def test_false_overrides_a_value_of_the_base_with_none(tmp_path: Path):
    write(tmp_path, "steps = 1\n[maybe]\nname = 'x'", "base.toml")
    path = write(tmp_path, "base = 'base.toml'\nmaybe = false\n[part]\nlimit = false")
    whole = load_config(path, Whole)
    assert whole.maybe is None
    assert whole.part.limit is None


def test_overrides_set_and_create_nested_keys(tmp_path: Path):
    path = write(tmp_path, "steps = 1")
    overrides = {
        "part.rate": "1e-4",
        "maybe.name": "plain words",
        "steps": "5",
        "words": '["x"]',
        "pair": "[1, 2]",
    }
    expected = Whole(5, Part(rate=1e-4), maybe=Part("plain words"), words=("x",), pair=(1, 2.0))
    assert load_config(path, Whole, overrides) == expected


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [("part.rtae", "1", "'rate'"), ("steps.x", "1", "not a table"), ("steps", "many", "'many'")],
)
def test_invalid_overrides_are_refused(tmp_path: Path, key: str, text: str, words: str):
    assert words in str(problem(write(tmp_path, "steps = 1"), {key: text}))


def test_none_with_a_boolean_default_cannot_be_dumped():
    @dataclass(frozen=True)
    class Odd:
        on: bool | None = True

    with pytest.raises(ConfigError, match="cannot be written"):
        dump_config(Odd(None))


def test_errors_of_the_dataclass_itself_pass_through(tmp_path: Path):
    @dataclass(frozen=True)
    class Picky:
        steps: int

        def __post_init__(self) -> None:
            raise ConfigError("never right")

    with pytest.raises(ConfigError, match="never right"):
        load_config(write(tmp_path, "steps = 1"), Picky)


def test_json_null_becomes_none():
    table: dict[str, Any] = {"limit": None}
    assert from_table(table, Part, "metadata").limit is None
