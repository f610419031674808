"""A real `skyloom serve` with its worker and the bundled model, asked by OpenAI's clients: Python 2 and 3, JavaScript.

`make conformance` runs it. The clients are installed into a temporary folder, which needs the network; without npm the
JavaScript client is left out, and the line says so. Prints one JSON line.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PYTHONS = {"python 3": "openai>=3,<4", "python 2": "openai>=2,<3"}
SERVE = "from skyloom.cli.app import main; main()"


def main() -> int:
    """Start a server, ask it by every client, stop it; 0 when all agreed."""
    with tempfile.TemporaryDirectory(prefix="skyloom-conformance-") as folder:
        command = [sys.executable, "-c", SERVE, "serve", "--port", "0", "--data", f"{folder}/data", "--json"]
        with (
            Path(folder, "server.log").open("w") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
        ):
            try:
                assert server.stdout
                ready = json.loads(server.stdout.readline())
                asked = {"OPENAI_BASE_URL": f"{ready['url']}/v1", "OPENAI_API_KEY": ready["token"]}
                told = {name: ask_python(Path(folder), asked, need) for name, need in PYTHONS.items()}
                told["javascript"] = ask_javascript(Path(folder), asked)
            finally:
                server.send_signal(signal.SIGTERM)
            told["server"] = {"exit": server.wait(60)}
    sys.stdout.write(json.dumps(told) + "\n")
    return int(any(result.get("exit") for result in told.values()))


def ask_python(folder: Path, asked: dict[str, str], need: str) -> dict[str, object]:
    """By a Python client of its own version, in an environment of its own."""
    place = folder / need.replace(">", "").replace("<", "").replace("=", "").replace(",", "-")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    subprocess.run(
        [place / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", need], check=True
    )
    show = "import openai; print(openai.__version__)"
    version = subprocess.run([place / "bin/python", "-c", show], capture_output=True, text=True, check=True).stdout
    return {"version": version.strip(), **_run([str(place / "bin/python"), str(HERE / "ask.py")], asked)}


def ask_javascript(folder: Path, asked: dict[str, str]) -> dict[str, object]:
    """By the JavaScript client."""
    if shutil.which("npm") is None:
        return {"left out": "there is no npm"}
    place = folder / "javascript"
    place.mkdir()
    (place / "package.json").write_text('{"type": "module", "private": true}')
    shutil.copy(HERE / "conformance.js", place)
    install = ["npm", "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", "openai"]
    subprocess.run(install, cwd=place, check=True)
    version = json.loads((place / "node_modules/openai/package.json").read_text())["version"]
    return {"version": version, **_run(["node", str(place / "conformance.js")], asked)}


def _run(command: list[str], asked: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
    return {"exit": done.returncode, "passed": len(done.stdout.splitlines())}


if __name__ == "__main__":
    sys.exit(main())
