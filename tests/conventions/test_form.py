"""How source files look: docstrings, sizes, names, and the words of the glossary."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "bench", "examples", "docs", "projects")
PATHS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PYTHON = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
TREES = {name: ast.parse(source) for name, source in PYTHON.items()}
SOURCES = ("src/", "projects/diorama/src/")
COMMAND_LINES = ("src/skyloom/cli/", "projects/diorama/src/diorama/cli/")
LIBRARY = {name: tree for name, tree in TREES.items() if name.startswith(SOURCES)}
FILE_LINES, FUNCTION_LINES = 600, 75
BANNED_FILES = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}
BANNED_WORDS = {
    "image_or_video",
    "model_output",
    "v_pred",
    "prompt_embeds",
    "encoder_hidden_states",
}
BANNED_WORDS |= {"num_inference_steps", "cfg_scale", "attn"}
CONVERTER = "src/skyloom/models/convert.py"  # of weights with other libraries' names


def lines_of(node: ast.AST) -> int:
    """How many lines a definition takes, its docstring included."""
    return node.end_lineno - node.lineno + 1


def test_files_are_named_for_what_lives_in_them():
    assert not [name for name in PYTHON if name.rsplit("/", maxsplit=1)[-1] in BANNED_FILES]


def test_every_module_says_what_lives_there():
    assert not [name for name, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]


def test_files_and_functions_are_short():
    long = [name for name, source in PYTHON.items() if len(source.splitlines()) > FILE_LINES]
    long += [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and lines_of(node) > FUNCTION_LINES
    ]
    assert not long, "split by meaning"


def test_public_functions_and_classes_say_what_they_do():
    assert not [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in LIBRARY.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]


def test_public_classes_have_different_names():
    files: dict[str, list[str]] = {}
    for name, tree in LIBRARY.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(name)
    shared = {name: where for name, where in files.items() if len(where) > 1}
    assert not shared


def test_no_bare_except():
    assert not [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def test_nothing_blinds_the_shape_checker():
    assert not [
        name
        for name, tree in TREES.items()
        if any(
            isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body
        )
    ]


def test_only_the_command_line_exits():
    assert not [
        f"{name}:{node.lineno}"
        for name, tree in LIBRARY.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in {"sys.exit", "os._exit"}
        and not name.startswith(COMMAND_LINES)
    ]


def test_every_database_engine_hides_parameters():
    calls = [
        (f"{name}:{node.lineno}", ast.unparse(node))
        for name, tree in LIBRARY.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("create_engine")
    ]
    assert calls
    assert not [
        place
        for place, call in calls
        if "**_QUIET" not in call and "hide_parameters=True" not in call
    ]


def test_identifiers_are_words_of_the_house():
    offenders = [
        f"{name}:{token.start[0]} {token.string}"
        for name in LIBRARY
        if name != CONVERTER
        for token in tokenize.generate_tokens(io.StringIO(PYTHON[name]).readline)
        if token.type == tokenize.NAME and token.string in BANNED_WORDS
    ]
    assert not offenders, "docs/glossary.md has our word for it"


def test_glossary_speaks_of_the_code():
    rows = re.findall(
        r"^\| ([^|]+) \|", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE
    )[2:]
    words = [word.strip().lower() for row in rows for word in row.split(",")]
    source = " ".join(PYTHON[name].lower() for name in LIBRARY)
    assert words
    assert len(words) == len(set(words)), "one word, one meaning"
    assert not [word for word in words if word not in source], "nobody says these"
