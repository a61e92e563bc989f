"""`python docs/build_architecture.py [--check]`: the list of modules in docs/architecture.md, from their docstrings.

Whoever adds or renames a module runs it; `make lint` runs it with --check. The page above the marker is written by hand
and left alone. Sources are parsed and not imported, so this needs the standard library only.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
MARKER = "<!-- Everything below is written by `python docs/build_architecture.py`. -->"
PACKAGES = ("preprocess", "recipes", "postprocess", "kaggle_kernels")
LEFT_OUT = "examples"  # built kernels: their modules are those of kaggle_kernels/runtime


def main() -> int:
    """Write the page, or with --check compare it; 0, or 2 where the page is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()

    page = PAGE.read_text(encoding="utf-8")
    current_page = rebuilt_page(page, ROOT)

    if arguments.check and page != current_page:
        command = "python docs/build_architecture.py"
        print(f"error: {PAGE.relative_to(ROOT)}: not up to date; run {command}", file=sys.stderr)
        return 2
    if not arguments.check:
        PAGE.write_text(current_page, encoding="utf-8")
    return 0


def rebuilt_page(page: str, root: Path) -> str:
    """Keep the page's text up to MARKER, and write one section for each package below `root`."""
    handwritten = page.partition(MARKER)[0].rstrip()
    sections = []
    for name in PACKAGES:
        for folder in package_folders(root / name):
            sections.append(package_section(folder, root))
    return "\n\n".join([handwritten, MARKER, *sections]) + "\n"


def package_folders(package: Path) -> list[Path]:
    """The folder of a package and all folders below it that hold Python files, parents first."""
    folders = {path.parent for path in package.rglob("*.py")}
    return sorted(folder for folder in folders if LEFT_OUT not in folder.relative_to(package).parts)


def package_section(folder: Path, root: Path) -> str:
    """A heading, the docstring of `__init__.py`, and a table with one line for each module."""
    relative_folder = folder.relative_to(root).as_posix()
    depth = relative_folder.count("/")
    parts = ["#" * (2 + min(depth, 1)) + f" {relative_folder}"]
    init_file = folder / "__init__.py"
    if init_file.exists():
        parts.append(module_docstring(init_file))

    table_lines = []
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            link = f"[{path.name}](../{relative_folder}/{path.name})"
            table_lines.append(f"| {link} | {summary_of(module_docstring(path))} |")
    if table_lines:
        parts.append("\n".join(["| module | purpose |", "|---|---|", *table_lines]))
    return "\n\n".join(parts)


def module_docstring(path: Path) -> str:
    """The docstring of a Python file, without indentation; empty where it has none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or ""


def summary_of(docstring: str) -> str:
    """The first paragraph of a docstring as one line of a Markdown table."""
    first_paragraph = docstring.partition("\n\n")[0]
    one_line = " ".join(first_paragraph.split())
    return one_line.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
