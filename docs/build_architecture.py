"""`python docs/build_architecture.py [--check]`: the table of rooms in docs/architecture.md, from docstrings.

Whoever adds a folder or a module, or describes a folder anew, runs it; `make lint` runs it with
--check. The page above the marker is written by hand and left alone. Sources are parsed and not
imported, so this needs the standard library only.
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
    current_page = rebuild_page(page, ROOT)

    if arguments.check and page != current_page:
        command = "python docs/build_architecture.py"
        print(f"error: {PAGE.relative_to(ROOT)}: not up to date; run {command}", file=sys.stderr)
        return 2
    if not arguments.check:
        PAGE.write_text(current_page, encoding="utf-8")
    return 0


def rebuild_page(page: str, root: Path) -> str:
    """Keep the page's text up to MARKER, and write a table with one row for each folder."""
    handwritten = page.partition(MARKER)[0].rstrip()
    table_lines = ["| room | purpose | modules |", "|---|---|---|"]
    for name in PACKAGES:
        for folder in find_package_folders(root / name):
            table_lines.append(describe_folder(folder, root))
    return "\n\n".join([handwritten, MARKER, "\n".join(table_lines)]) + "\n"


def find_package_folders(package: Path) -> list[Path]:
    """The folder of a package and all folders below it that hold Python files, parents first."""
    folders = {path.parent for path in package.rglob("*.py")}
    return sorted(folder for folder in folders if LEFT_OUT not in folder.relative_to(package).parts)


def describe_folder(folder: Path, root: Path) -> str:
    """One row of the table: a folder, the summary of its `__init__.py`, the names of its modules."""
    relative_folder = folder.relative_to(root).as_posix()
    purpose = ""
    module_names = []
    for path in sorted(folder.glob("*.py")):
        if path.name == "__init__.py":
            purpose = read_summary(path)
        else:
            module_names.append(path.stem)
    return f"| [{relative_folder}](../{relative_folder}) | {purpose} | {', '.join(module_names)} |"


def read_summary(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line that a table can hold."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first_paragraph = docstring.partition("\n\n")[0]
    one_line = " ".join(first_paragraph.split())
    return one_line.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
