"""Build a spec's kernel: one readable kernel.py that runs on Kaggle without this repository, and its kernel-metadata.json.

The kernel is the modules of kaggle_kernels/runtime one after another, each under a heading with its docstring. It reads
like an article: settings and story first, details below. Imports are merged at the top, and the last lines run the kernel. What
functions take, return and raise is left to the modules' own docstrings.

`build` writes to outputs/kernels/NAME. `rehearse` and `push` read the kernel there and refuse it if it is out of date.
kaggle_kernels/examples/demo is a committed example.
"""

import ast
import functools
import json
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ruff import find_ruff_bin

from kaggle_kernels.build.memory_fit import Fit, describe_memory, fit_packages, package_settings
from kaggle_kernels.build.packages import choose_temperature
from kaggle_kernels.build.spec import Spec, read_spec, settings_of
from postprocess.package import OWNER
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file

KERNELS = Path("outputs") / "kernels"
RUNTIME = Path(__file__).parents[1] / "runtime"

# The runtime's modules in the order of the kernel: what a reader wants first, then what it uses. Only names that Python needs
# as it reads the file, e.g. for a constant or a decorator, must be defined above.
MODULES = (
    "settings",
    "main",
    "scheduling.schedule",
    "scheduling.pass_runner",
    "scheduling.worker_handle",
    "scheduling.worker",
    "scheduling.plan",
    "inputs",
    "package",
    "checks",
    "visible",
    "submission",
    "models.scoring",
    "models.model",
    "models.overflow",
    "models.shortcuts",
    "models.fused",
    "models.gptq",
    "models.placement",
    "models.pipeline",
)


# The layout of kernel.py, in characters. Its lines are as long as those of the runtime's modules.
LINE_WIDTH = "100"
DOCSTRING_WIDTH = 96
SETTINGS_PLACE = "SETTINGS = ...\n"
RULE = "# " + "=" * 96

ImportStatement = ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Module:
    """A module of the runtime, taken apart."""

    name: str
    docstring: str
    imports: tuple[str, ...]  # statements, without those from other modules of the runtime
    body: str  # the text below the imports
    defined_names: tuple[str, ...]


def kernel_folder(spec_path: Path, kernels: Path = KERNELS) -> Path:
    """The folder of a spec's kernel, below the folder of all kernels."""
    return kernels / spec_path.stem


def build(spec_path: Path, kernels: Path = KERNELS) -> list[Path]:
    """Write a spec's kernel, below the folder of all kernels, where it is absent or out of date.

    Returns:
        The files that were written; none if the kernel was up to date.
    """
    stale = stale_files(spec_path, kernels)
    for path, text in stale.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(stale)


def generate_files(spec_path: Path) -> dict[str, str]:
    """Generate the kernel's files, as text by name; UserError where the spec does not fit two T4s."""
    spec = read_spec(spec_path)
    fits = fit_packages(spec_path, spec)
    return {
        "kernel.py": kernel_text(spec_path.stem, spec, fits),
        "kernel-metadata.json": json.dumps(make_metadata(spec), indent=2) + "\n",
    }


def stale_files(spec_path: Path, kernels: Path = KERNELS) -> dict[Path, str]:
    """Find the files of a kernel that are absent or out of date, each with the text it should have."""
    folder = kernel_folder(spec_path, kernels)
    stale = {}
    for name, text in generate_files(spec_path).items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale[path] = text
    return stale


def check_built(spec_path: Path) -> Path:
    """Return the folder of a spec's built kernel.

    Raises:
        UserError: The kernel is not built, or the spec, a recipe or the runtime changed since then.
    """
    folder = kernel_folder(spec_path)
    stale = stale_files(spec_path)
    if stale:
        names = ", ".join(path.name for path in stale)
        raise UserError(
            f"{folder}: {names} not up to date; run `python -m kaggle_kernels build {spec_path}`"
        )
    return folder


def make_metadata(spec: Spec) -> dict:
    """Describe the kernel to Kaggle, as kernel-metadata.json does: two T4s, no internet, its datasets."""
    datasets = [package.dataset for package in spec.packages]
    if spec.wheels is not None:
        datasets.append(spec.wheels)

    # The keys are explained in https://github.com/Kaggle/kaggle-api/wiki/Kernel-Metadata.
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
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [f"{OWNER}/{dataset}" for dataset in datasets],
        "competition_sources": [COMPETITIONS[spec.competition].slug],
        "kernel_sources": [],
        "model_sources": [],
    }


def kernel_text(name: str, spec: Spec, fits: Sequence[Fit]) -> str:
    """Generate the source of kernel.py from a spec and its packages, placed on the GPUs."""
    docstring = format_docstring(name, spec, fits)
    packages = [package_settings(fit) for fit in fits]
    settings = settings_of(name, spec, packages, choose_temperature(spec))
    source_of_settings = format_source(f"SETTINGS = {settings!r}\n")
    return f"{docstring}\n\n{assemble_runtime().replace(SETTINGS_PLACE, source_of_settings)}"


@functools.cache
def assemble_runtime() -> str:
    """Put together the source that all kernels share: imports, the runtime's modules and the call that runs it.

    Returns:
        The source, with SETTINGS_PLACE where a kernel has its settings.
    """
    modules = [read_module(name) for name in MODULES]
    check_names(modules)

    # Annotations may name what is defined below.
    imports = ["from __future__ import annotations"]
    sections = []
    for module in modules:
        imports += module.imports
        sections.append(format_section(module))
        # The settings follow the module that defines their classes: a reader meets them first.
        if module.name == "settings":
            sections.append(SETTINGS_PLACE)

    ending = 'if __name__ == "__main__":\n    run_kernel(SETTINGS)\n    leave()\n'
    return format_source("\n\n\n".join(["\n".join(imports), *sections, ending]))


def format_source(source: str) -> str:
    """Merge and sort the imports of Python source and lay it out, both by ruff."""
    # The options leave out any ruff.toml, so that a kernel is the same wherever it is built.
    for command in (["check", "--select", "I", "--fix"], ["format"]):
        ruff = [find_ruff_bin(), *command, "--isolated", "--line-length", LINE_WIDTH, "-"]
        done = subprocess.run(ruff, input=source, capture_output=True, encoding="utf-8", check=True)
        source = done.stdout
    return source


def format_docstring(name: str, spec: Spec, fits: Sequence[Fit]) -> str:
    """Write the docstring of kernel.py: what it does, where it comes from, what memory it needs."""
    competition = COMPETITIONS[spec.competition]
    memory = textwrap.fill(describe_memory(fits, spec), DOCSTRING_WIDTH)
    return (
        f'"""{spec.title}: scores the pairs of {competition.slug} and writes submission.csv.\n\n'
        f"Generated from the spec {name}.yml by `python -m kaggle_kernels build {name}`; "
        "change that, not this.\n"
        "It runs on two T4s without internet, and needs the datasets that SETTINGS names and the "
        "competition's files.\n\n"
        f'{memory}\n"""'
    )


def format_section(module: Module) -> str:
    """Write a module as a section of the kernel: its name and docstring as a block of comments, then its body."""
    # The heading: a rule, the file's name and its docstring.
    lines = [RULE, f"# {module.name.replace('.', '/')}.py"]
    for line in module.docstring.splitlines():
        lines.append(f"# {line}".rstrip())
    return "\n".join([*lines, "", module.body])


@functools.cache
def read_module(name: str) -> Module:
    """Read a module of the runtime and take it apart for the kernel.

    Its imports from other modules of the runtime are left out: the kernel holds these itself.
    """
    source = (RUNTIME / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)

    docstring, *statements = tree.body
    header_end = docstring.end_lineno  # the last line of the docstring and the imports
    outside_imports = []
    defined_names = []
    for statement in statements:
        if isinstance(statement, ImportStatement):
            header_end = statement.end_lineno
            if not ast.unparse(statement).startswith("from kaggle_kernels.runtime"):
                outside_imports.append(ast.unparse(statement))
        else:
            defined_names += list_defined_names(statement)

    # The text as it was written, with its comments, which the syntax tree has lost.
    body_lines = shorten_docstrings(source, tree)[header_end:]
    return Module(
        name=name,
        docstring=ast.get_docstring(tree),
        imports=tuple(outside_imports),
        body="\n".join(body_lines).strip("\n"),
        defined_names=tuple(defined_names),
    )


def shorten_docstrings(source: str, tree: ast.Module) -> list[str]:
    """Leave the sections Args, Returns and Raises out of the functions' docstrings.

    Returns:
        The lines of the source that are left.
    """
    lines = source.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]

    # From the last one to the first, so that the line numbers of those above stay right.
    functions.sort(key=lambda function: function.lineno, reverse=True)
    for function in functions:
        if ast.get_docstring(function):
            docstring = function.body[0]
            start, end = docstring.lineno - 1, docstring.end_lineno
            lines[start:end] = drop_sections(lines[start:end])
    return lines


def drop_sections(docstring_lines: list[str]) -> list[str]:
    """Drop the sections at the end of a docstring, from the first of Args, Returns and Raises on.

    The lines are those of the source, quotes included: the last of several holds the closing ones.
    """
    for place, line in enumerate(docstring_lines):
        if line.strip() not in ("Args:", "Returns:", "Raises:"):
            continue

        # The blank line above the section goes too. If only the summary is left, the docstring is
        # closed in its line.
        kept_lines = docstring_lines[: place - 1]
        if len(kept_lines) == 1:
            return [kept_lines[0] + '"""']
        closing_quotes = docstring_lines[-1]
        return [*kept_lines, closing_quotes]
    return docstring_lines


def list_defined_names(statement: ast.stmt) -> list[str]:
    """List the names that a statement at the top level of a module defines: a function, a class or constants."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets]
    return []


def check_names(modules: Sequence[Module]) -> None:
    """Raise ValueError where two modules define the same name: in one file the second would replace the first."""
    defined_in: dict[str, str] = {}
    for module in modules:
        for name in module.defined_names:
            if name in defined_in:
                raise ValueError(
                    f"{module.name}.py and {defined_in[name]}.py both define {name}; rename one"
                )
            defined_in[name] = module.name
