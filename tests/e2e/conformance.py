"""Test a real `skyloom serve` with OpenAI's clients: Python versions 2 and 3, and JavaScript.

`make conformance` runs it, with a worker and the bundled model. The clients are installed into a
temporary folder, which needs the network; without npm the JavaScript client is skipped and reported
as such. A second server with an S3 store (moto on this machine) is tested with Python 3 only.
Prints one JSON line.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
PYTHONS = {"python 3": "openai>=3,<4", "python 2": "openai>=2,<3"}
SERVE = "from skyloom.cli.app import main; main()"


def main() -> int:
    """Test a server with every client, and one with S3 storage; return 0 if all passed."""
    with tempfile.TemporaryDirectory(prefix="skyloom-conformance-") as name:
        folder = Path(name)
        with _serving(folder / "files", {}) as client:
            results = {name: ask_python(folder, client, need) for name, need in PYTHONS.items()}
            results["javascript"] = ask_javascript(folder, client)
        with _object_store(folder) as store, _serving(folder / "s3", store) as client:
            results["python 3, files in S3"] = ask_python(folder, client, PYTHONS["python 3"])
    sys.stdout.write(json.dumps(results) + "\n")
    return int(any(result.get("exit") for result in results.values()))


@contextmanager
def _serving(folder: Path, settings: dict[str, str]) -> Iterator[dict[str, str]]:
    """Run a server during the block; yield the environment variables of its clients."""
    folder.mkdir()
    command = [
        sys.executable,
        "-c",
        SERVE,
        "serve",
        "--port",
        "0",
        "--data",
        f"{folder}/data",
        "--json",
    ]
    environment = {**os.environ, **settings}
    with (
        Path(folder, "server.log").open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as server,
    ):
        try:
            assert server.stdout
            ready = json.loads(server.stdout.readline())
            yield {"OPENAI_BASE_URL": f"{ready['url']}/v1", "OPENAI_API_KEY": ready["token"]}
        finally:
            server.send_signal(signal.SIGTERM)
        if code := server.wait(60):
            raise SystemExit(f"the server ended with {code}")


@contextmanager
def _object_store(folder: Path) -> Iterator[dict[str, str]]:
    """Run an S3 store with a bucket; yield the settings and keys for a server."""
    programs = _environment(folder / "moto", "moto[server]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}
    url = f"http://127.0.0.1:{port}"
    make = (
        f"import boto3; store = boto3.client('s3', 'us-east-1', endpoint_url='{url}');"
        " store.create_bucket(Bucket='videos')"
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(
        [programs / "moto_server", "-H", "127.0.0.1", "-p", str(port)], **quiet
    ) as store:
        try:
            for _ in range(50):  # until it answers
                if not subprocess.run(
                    [programs / "python", "-c", make],
                    check=False,
                    env={**os.environ, **keys},
                    **quiet,
                ).returncode:
                    break
                time.sleep(0.5)
            yield {
                **keys,
                "AWS_ENDPOINT_URL": url,
                "AWS_ALLOW_HTTP": "true",
                "SKYLOOM_STORAGE_URL": "s3://videos/made",
            }
        finally:
            store.terminate()


def _environment(place: Path, *needs: str) -> Path:
    """A Python environment with some packages; the folder of its programs."""
    if not place.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        install = [
            place / "bin/python",
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            *needs,
        ]
        subprocess.run(install, check=True)
    return place / "bin"


def ask_python(folder: Path, client: dict[str, str], need: str) -> dict[str, object]:
    """Run ask.py with a version of the Python client, in a new environment."""
    programs = _environment(
        folder / need.replace(">", "").replace("<", "").replace("=", "").replace(",", "-"), need
    )
    show = "import openai; print(openai.__version__)"
    version = subprocess.run(
        [programs / "python", "-c", show], capture_output=True, text=True, check=True
    ).stdout
    return {
        "version": version.strip(),
        **_run([str(programs / "python"), str(HERE / "ask.py")], client),
    }


def ask_javascript(folder: Path, client: dict[str, str]) -> dict[str, object]:
    """Run conformance.js with the JavaScript client."""
    if shutil.which("npm") is None:
        return {"left out": "there is no npm"}
    place = folder / "javascript"
    place.mkdir()
    (place / "package.json").write_text('{"type": "module", "private": true}')
    shutil.copy(HERE / "conformance.js", place)
    install = [
        "npm",
        "install",
        "--silent",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "openai",
    ]
    subprocess.run(install, cwd=place, check=True)
    version = json.loads((place / "node_modules/openai/package.json").read_text())["version"]
    return {"version": version, **_run(["node", str(place / "conformance.js")], client)}


def _run(command: list[str], client: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        command, env={**os.environ, **client}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
    return {"exit": done.returncode, "passed": len(done.stdout.splitlines())}


if __name__ == "__main__":
    sys.exit(main())
