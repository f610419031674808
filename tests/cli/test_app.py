"""The command line: error messages, exit codes, and no heavy imports for --version and --help."""

import errno
import subprocess
import sys

import pytest

import skyloom as package
from skyloom.cli import app
from skyloom.cli.commands import VERBS
from skyloom.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MediaError,
    RequestError,
)

HEAVY = ("torch", "numpy", "av", "PIL", "safetensors", "einops")


@pytest.mark.parametrize("module", ["skyloom", "skyloom.cli.app"])
def test_nothing_heavy_is_imported(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_public_names_are_imported_on_use():
    for name in package.__all__:
        assert getattr(package, name)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = package.missing


def test_version_imports_no_typer():
    code = "import sys; from skyloom.cli.app import main; main(['--version'])"
    wrapped = f"import atexit, sys; atexit.register(lambda: print('typer' in sys.modules)); {code}"
    ran = subprocess.run(
        [sys.executable, "-c", wrapped], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == [f"skyloom {package.__version__}", "False"]


def test_help_lists_every_verb_without_rich():
    code = "import sys; from skyloom.cli.app import main; main(['--help'])"
    wrapped = f"import atexit, sys; atexit.register(lambda: print('rich' in sys.modules)); {code}"
    ran = subprocess.run(
        [sys.executable, "-c", wrapped], capture_output=True, text=True, check=True
    )
    *lines, rich = ran.stdout.splitlines()
    assert rich == "False"
    assert not set(VERBS) - {line.split()[0] for line in lines if line.startswith("  ")}


def test_version(skyloom):
    assert skyloom("--version") == (0, f"skyloom {package.__version__}\n", "")


@pytest.mark.parametrize(
    "verb", ["generate", "train", "doctor", "models", "world", "data", "evaluate"]
)
def test_every_verb_has_help(skyloom, verb):
    ran = skyloom(verb, "--help")
    assert ran.code == 0
    assert f"skyloom {verb}" in ran.out


@pytest.mark.parametrize(
    "words", [["generat"], ["generate"], ["generate", "a", "--seconds", "long"], ["models", "x"]]
)
def test_invalid_words_are_usage_errors(skyloom, words):
    ran = skyloom(*words)
    assert ran.code == 2
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RequestError("No.", hint="Do."), 2, "No. Do."),
        (ConfigError("No."), 2, "No."),
        (CheckpointError("No."), 1, "No."),
        (MediaError("No."), 1, "No."),
        (CapacityError("No."), 1, "No."),
        (MemoryError(), 1, "Out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            1,
            "Out of memory",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x.toml"),
            1,
            "x.toml: Permission denied. Check",
        ),
        (ZeroDivisionError("division\nby zero"), 1, "ZeroDivisionError: division (this is a bug"),
    ],
)
def test_errors_have_a_message_and_an_exit_code(skyloom, monkeypatch, error, code, message):
    def fail():
        raise error

    monkeypatch.setattr("skyloom.models.registry.list_models", fail)
    ran = skyloom("models", "list")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(f"skyloom: {message}")
    assert ran.err.count("\n") == 1
    for words in (["--debug", "models", "list"], ["models", "list", "--debug"]):
        with pytest.raises(type(error)):
            app.main(words)


def test_interrupt_has_exit_code_130(skyloom, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("skyloom.models.registry.list_models", interrupt)
    assert skyloom("models", "list").code == 130


def test_windows_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit) as caught:
        app.main(["doctor"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "skyloom: Windows is not supported. Use WSL 2.\n"
