"""Write the file tree of ARCHITECTURE.md from the first line of each module's docstring."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN = "<!-- tree: written by docs/write_tree.py -->"
END = "<!-- end of tree -->"
WIDTH = 28


def summary(path: Path) -> str:
    """Return the first line of a module's docstring without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].rstrip(".")


def tree(folder: Path, depth: int = 0) -> list[str]:
    """List a package: its own line, then its modules, then its packages."""
    indent = "  " * depth
    lines = [f"{indent}{folder.name + '/':{WIDTH - len(indent)}}{summary(folder / '__init__.py')}"]
    indent += "  "
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    lines += [f"{indent}{path.name:{WIDTH - len(indent)}}{summary(path)}" for path in modules]
    for package in sorted(path.parent for path in folder.glob("*/__init__.py")):
        lines += tree(package, depth + 1)
    return lines


def page() -> str:
    """Return ARCHITECTURE.md with a current tree."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    packages = (ROOT / "src/skyloom", ROOT / "projects/diorama/src/diorama")
    lines = "\n".join(line for package in packages for line in tree(package))
    return f"{before}{BEGIN}\n```\n{lines}\n```\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
