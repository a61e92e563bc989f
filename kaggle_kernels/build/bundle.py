"""A spec becomes one readable file that runs on Kaggle without this repository: the runtime's modules, put one after another.

It goes to outputs/kernels/NAME: kernel.py and kernel-metadata.json. One example, kaggle_kernels/examples/demo, is committed.
Imports are merged at the top, each module keeps its text under a heading, the spec's settings come first.
"""

import ast
import functools
import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from kaggle_kernels.build.memory_fit import Fit, fit_packages, memory_sentence, package_settings
from kaggle_kernels.build.spec import COMPETITIONS, Spec, read_spec, settings_of
from kaggle_kernels.runtime.settings import PackageSettings, Settings
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file

KERNELS = Path("outputs") / "kernels"  # of the current folder, as everything that is made
RUNTIME = Path(__file__).parents[1] / "runtime"
MODULES = (
    "settings",
    "package",
    "models.placement",
    "models.pipeline",
    "models.gptq",
    "models.shortcuts",
    "models.model",
    "models.scoring",
    "scheduling.plan",
    "inputs",
    "submission",
    "checks",
    "visible",
    "scheduling.worker",
    "scheduling.crew",
    "scheduling.engine",
    "scheduling.schedule",
    "main",
)  # each before what imports it
OWNER = "INSERT_OWNER"  # stands for the Kaggle account, which is known at push
RULE = "# " + "=" * 110
WIDTH = 120
BUILD_DIGITS = 16
LINE = 128  # what ruff allows


@dataclass(frozen=True)
class Module:
    """A runtime module taken apart: its docstring, what it imports from elsewhere, and the rest of its text."""

    name: str
    docstring: str
    imports: tuple[ast.Import | ast.ImportFrom, ...]
    body: str
    names: tuple[str, ...]


def kernel_folder(spec_path: Path, kernels: Path = KERNELS) -> Path:
    """Where the spec's kernel is written."""
    return kernels / spec_path.stem


def generate(spec_path: Path) -> dict[str, str]:
    """The text of each generated file, by name; a UserError where the spec does not fit two T4s."""
    spec = read_spec(spec_path)
    return {
        "kernel.py": kernel_text(spec_path.stem, spec, fit_packages(spec_path, spec)),
        "kernel-metadata.json": json.dumps(kernel_metadata(spec), indent=2) + "\n",
    }


def build(spec_path: Path, kernels: Path = KERNELS) -> list[Path]:
    """Write the spec's kernel into its folder below `kernels`; the files that changed."""
    texts = generate(spec_path)
    changed = stale_files(spec_path, kernels)
    for path in changed:
        with atomic_file(path) as temporary:
            temporary.write_text(texts[path.name], encoding="utf-8")
    return changed


def stale_files(spec_path: Path, kernels: Path = KERNELS) -> list[Path]:
    """The generated files that are absent or differ from what the spec and the runtime give now."""
    folder = kernel_folder(spec_path, kernels)
    return [
        folder / name
        for name, text in generate(spec_path).items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def check_built(spec_path: Path) -> Path:
    """The folder of the spec's kernel; a UserError where it was not built since the spec or the runtime changed."""
    stale = stale_files(spec_path)
    if stale:
        names = ", ".join(path.name for path in stale)
        folder = kernel_folder(spec_path)
        raise UserError(
            f"{folder}: {names} not up to date; run `python -m kaggle_kernels build {spec_path}`"
        )
    return kernel_folder(spec_path)


def kernel_metadata(spec: Spec) -> dict:
    """kernel-metadata.json: two T4s, no internet. The owner is a placeholder until push."""
    datasets = [
        *(package.dataset for package in spec.packages),
        *([spec.wheels] if spec.wheels else []),
    ]
    return {
        "id": f"{OWNER}/{spec.slug}",
        "title": spec.title,
        "code_file": "kernel.py",
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,
        "machine_shape": spec.accelerator,
        "dataset_sources": [f"{OWNER}/{dataset}" for dataset in datasets],
        "competition_sources": [COMPETITIONS[spec.competition].slug],
        "kernel_sources": [],
        "model_sources": [],
    }


def kernel_text(name: str, spec: Spec, fits: Sequence[Fit]) -> str:
    """The kernel as one Python file, its `build` set to a hash of all the rest."""
    text = unmarked_text(name, spec, fits)
    mark = hashlib.sha256(text.encode()).hexdigest()[:BUILD_DIGITS]
    return text.replace('    build="",\n', f'    build="{mark}",\n', 1)


def build_mark(text: str) -> str:
    """The `build` of a kernel's text, which its kernel.json repeats."""
    return re.search(r'^    build="(\w+)",$', text, re.MULTILINE)[1]


def unmarked_text(name: str, spec: Spec, fits: Sequence[Fit]) -> str:
    """The kernel as one Python file, but for its `build`."""
    modules = [read_module(module) for module in MODULES]
    check_names(modules)
    parts = [
        f'"""{spec.title}: scores the pairs of {COMPETITIONS[spec.competition].slug} and writes submission.csv.\n\n'
        f"Generated from the spec {name}.yml by `python -m kaggle_kernels build {name}`; change that, not this.\n"
        "It runs on two T4s without internet, and needs the datasets that SETTINGS names and the competition's files.\n\n"
        f"{textwrap.fill(memory_sentence(fits, spec), WIDTH)}\n"
        '"""',
        merge_imports(modules),
    ]
    for module in modules:
        parts.append(("\n" if len(parts) > 2 else "") + heading(module))
        parts.append(
            ("\n" if module.body.startswith(("def ", "class ", "@")) else "") + module.body
        )
        if module.name == "settings":
            parts.append(
                f"\nSETTINGS = {settings_literal(settings_of(name, spec, [package_settings(fit) for fit in fits]))}"
            )
    parts.append('\nif __name__ == "__main__":\n    run_kernel(SETTINGS)\n    leave()\n')
    return "\n\n".join(parts)


@functools.cache
def read_module(name: str) -> Module:
    """Take a runtime module apart. Imports stand at its top, those of other runtime modules name what they take."""
    source = (RUNTIME / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstring, *statements = tree.body
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    rest = [node for node in statements if node not in imports]
    start = max(node.end_lineno for node in (docstring, *imports))
    outside = [node for node in imports if not is_of_runtime(node)]
    if any(alias.asname for node in imports if is_of_runtime(node) for alias in node.names):
        raise ValueError(
            f"{name}.py: imports from the runtime under another name; in one file there is only the first"
        )
    body = "\n".join(source.splitlines()[start:]).strip("\n")
    names = [node.name for node in rest if hasattr(node, "name")]
    names += [target.id for node in rest if isinstance(node, ast.Assign) for target in node.targets]
    return Module(name, ast.get_docstring(tree), tuple(outside), body, tuple(names))


def is_of_runtime(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import takes from this runtime, whose modules the kernel holds itself."""
    return isinstance(node, ast.ImportFrom) and node.module.startswith("kaggle_kernels.runtime")


def check_names(modules: list[Module]) -> None:
    """Raise ValueError where two modules define the same name: in one file the second would replace the first."""
    seen: dict[str, str] = {}
    for module in modules:
        for name in module.names:
            if name in seen:
                raise ValueError(
                    f"{module.name}.py and {seen[name]}.py both define {name}; rename one"
                )
            seen[name] = module.name


def merge_imports(modules: list[Module]) -> str:
    """All imports once: standard library, then the rest, sorted as ruff sorts them."""
    plain: set[str] = set()
    taken: dict[str, set[str]] = {}
    for node in (node for module in modules for node in module.imports):
        written = {
            alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in node.names
        }
        if isinstance(node, ast.Import):
            plain |= written
        else:
            taken.setdefault(node.module, set()).update(written)
    blocks = []
    for is_standard in (True, False):
        lines = [
            f"import {name}"
            for name in sorted(plain)
            if is_of_standard_library(name) == is_standard
        ]
        lines += [
            from_import(module, sorted(names, key=import_order))
            for module, names in sorted(taken.items())
            if is_of_standard_library(module) == is_standard
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(block for block in blocks if block)


def from_import(module: str, names: Sequence[str]) -> str:
    """An import on one line, or where that is too long with a line a name."""
    line = f"from {module} import {', '.join(names)}"
    return (
        line
        if len(line) <= LINE
        else "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
    )


def is_of_standard_library(module: str) -> bool:
    """Whether Python itself brings the module."""
    return module.split(".")[0].split(" ")[0] in sys.stdlib_module_names


def import_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def heading(module: Module) -> str:
    """A module's name and docstring as a comment."""
    lines = [f"# {line}".rstrip() for line in module.docstring.splitlines()]
    return "\n".join([RULE, f"# {module.name.replace('.', '/')}.py", "#", *lines, RULE])


def settings_literal(settings: Settings) -> str:
    """The settings as Python source, one a line."""
    lines = [
        f"    {name.name}={literal(getattr(settings, name.name))}," for name in fields(settings)
    ]
    return "\n".join(["Settings(", *lines, ")"])


def literal(value: object) -> str:
    """A setting as Python source with double quotes; what is said of a package stands one a line."""
    if isinstance(value, PackageSettings):
        lines = [f"            {name}={literal(of)}," for name, of in vars(value).items()]
        return "\n".join(["PackageSettings(", *lines, "        )"])
    if isinstance(value, tuple):
        items = [literal(item) for item in value]
        if isinstance(value[0], PackageSettings):
            return "\n".join(["(", *(f"        {item}," for item in items), "    )"])
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    return json.dumps(value) if isinstance(value, str) else repr(value)
