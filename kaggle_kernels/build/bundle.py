"""Build a spec's kernel: one readable kernel.py that runs on Kaggle without this repository, and its kernel-metadata.json.

The kernel is the modules of kaggle_kernels/runtime one after another, each under a heading with its docstring. It reads
like an article: settings and story first, details below. Imports are merged at the top, and the last lines run the kernel. What
functions take, return and raise is left to the modules' own docstrings.

`build` writes to outputs/kernels/NAME. `rehearse` and `push` read the kernel there and refuse it if it is out of date.
kaggle_kernels/examples/demo is a committed example.
"""

import ast
import functools
import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kaggle_kernels.build.memory_fit import Fit, describe_memory, fit_packages, package_settings
from kaggle_kernels.build.packages import choose_temperature
from kaggle_kernels.build.spec import Spec, read_spec, settings_of
from kaggle_kernels.runtime.settings import PackageSettings, Settings
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
LINE_WIDTH = 100
DOCSTRING_WIDTH = 96
RULE = "# " + "=" * 96

# How much of the SHA-256 identifies a build, in hexadecimal digits.
BUILD_DIGITS = 16

ImportStatement = ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Module:
    """A module of the runtime, taken apart."""

    name: str
    docstring: str
    imports: tuple[ImportStatement, ...]  # without those from other modules of the runtime
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
    texts = generate_files(spec_path)
    written = stale_files(spec_path, kernels)
    for path in written:
        with atomic_file(path) as temporary:
            temporary.write_text(texts[path.name], encoding="utf-8")
    return written


def generate_files(spec_path: Path) -> dict[str, str]:
    """Generate the kernel's files, as text by name; UserError where the spec does not fit two T4s."""
    spec = read_spec(spec_path)
    fits = fit_packages(spec_path, spec)
    return {
        "kernel.py": kernel_text(spec_path.stem, spec, fits),
        "kernel-metadata.json": json.dumps(make_metadata(spec), indent=2) + "\n",
    }


def stale_files(spec_path: Path, kernels: Path = KERNELS) -> list[Path]:
    """List the files of a kernel that are absent, or not what the spec and the runtime give now."""
    folder = kernel_folder(spec_path, kernels)
    stale = []
    for name, text in generate_files(spec_path).items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
    return stale


def check_built(spec_path: Path) -> Path:
    """Return the folder of a spec's kernel; UserError if the spec or the runtime changed since it was built."""
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
        "machine_shape": spec.accelerator,
        "dataset_sources": [f"{OWNER}/{dataset}" for dataset in datasets],
        "competition_sources": [COMPETITIONS[spec.competition].slug],
        "kernel_sources": [],
        "model_sources": [],
    }


def kernel_text(name: str, spec: Spec, fits: Sequence[Fit]) -> str:
    """Generate kernel.py from a spec and its placed packages.

    Returns:
        The source. Its `build` setting is a hash of all the rest, so that two kernels that differ have different builds.
    """
    docstring = format_docstring(name, spec, fits)
    packages = [package_settings(fit) for fit in fits]
    settings = settings_of(name, spec, packages, choose_temperature(spec))

    # The hash cannot hold itself: it is that of the same text with an empty `build`.
    unmarked_text = assemble_kernel(docstring, settings)
    digest = hashlib.sha256(unmarked_text.encode()).hexdigest()
    return assemble_kernel(docstring, replace(settings, build=digest[:BUILD_DIGITS]))


def build_mark(kernel: str) -> str:
    """Read the `build` setting out of a kernel's text. The kernel repeats it in its kernel.json."""
    return re.search(r'^    build="(\w+)",$', kernel, re.MULTILINE)[1]


def assemble_kernel(docstring: str, settings: Settings) -> str:
    """Put the parts of kernel.py together: docstring, imports, modules, settings, and the call that runs it."""
    modules = [read_module(name) for name in MODULES]
    check_names(modules)

    # The settings follow the module that defines their classes, so that a reader meets them before the code.
    sections = []
    for module in modules:
        section = format_section(module)
        if module.name == "settings":
            section += f"\n\n\nSETTINGS = {format_settings(settings)}"
        sections.append(section)

    # Annotations may name what is defined below.
    imports = f"from __future__ import annotations\n\n{merge_imports(modules)}"

    # Blank lines as ruff wants them: two around the sections, one below the imports.
    head = f"{docstring}\n\n{imports}\n\n"
    ending = 'if __name__ == "__main__":\n    run_kernel(SETTINGS)\n    leave()\n'
    return head + "\n\n\n".join([*sections, ending])


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
    # The heading: the file's name and its docstring between two rules.
    lines = [RULE, f"# {module.name.replace('.', '/')}.py", "#"]
    for line in module.docstring.splitlines():
        lines.append(f"# {line}".rstrip())
    lines.append(RULE)

    # ruff wants two blank lines above a function or a class, one above anything else.
    starts_with_definition = module.body.startswith(("def ", "class ", "@"))
    blank_lines = ["", ""] if starts_with_definition else [""]
    return "\n".join([*lines, *blank_lines, module.body])


@functools.cache
def read_module(name: str) -> Module:
    """Take a module of the runtime apart, without its imports from other modules that the kernel holds itself."""
    source = (RUNTIME / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)

    docstring, *statements = tree.body
    header_end = docstring.end_lineno  # the last line of the docstring and the imports
    outside_imports = []
    defined_names = []
    for statement in statements:
        if isinstance(statement, ImportStatement):
            header_end = statement.end_lineno
            if ast.unparse(statement).startswith("from kaggle_kernels.runtime"):
                check_is_not_renamed(statement, name)
            else:
                outside_imports.append(statement)
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
        The lines of the source. A line that is left out is no line any more, so that only those
        above the first function keep their numbers.
    """
    lines = source.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    functions.sort(key=lambda function: function.lineno, reverse=True)  # from the end
    for function in functions:
        if not ast.get_docstring(function):
            continue
        start = function.body[0].lineno - 1
        end = function.body[0].end_lineno
        for place in range(start, end):
            if lines[place].strip() in ("Args:", "Returns:", "Raises:"):
                kept_lines = lines[start : place - 1]  # without the blank line
                closing_line = lines[end - 1]
                if len(kept_lines) == 1:
                    kept_lines = [kept_lines[0] + closing_line.strip()]
                else:
                    kept_lines.append(closing_line)
                lines[start:end] = kept_lines
                break
    return lines


def check_is_not_renamed(statement: ImportStatement, importer: str) -> None:
    """Raise ValueError where an import from the runtime has an `as`: the kernel does not define the second name."""
    for alias in statement.names:
        if alias.asname is not None:
            raise ValueError(
                f"{importer}.py: imports {alias.name} from the runtime as {alias.asname}; in one file "
                f"there is only {alias.name}"
            )


def list_defined_names(statement: ast.stmt) -> list[str]:
    """List the names that a module's statement defines: a function, a class or constants."""
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


def merge_imports(modules: Sequence[Module]) -> str:
    """Merge the modules' imports into one block for the standard library and one for the rest, in ruff's order."""
    # Collect what is imported, once: `import name` and `from module import names`.
    whole_modules: set[str] = set()
    names_by_module: dict[str, set[str]] = {}
    for module in modules:
        for statement in module.imports:
            names = {ast.unparse(alias) for alias in statement.names}  # "torch", or "torch as t"
            if isinstance(statement, ast.Import):
                whole_modules.update(names)
            else:
                names_by_module.setdefault(statement.module, set()).update(names)

    # Write the statements: of each block first whole modules, then names, both in alphabetical order.
    statements = [f"import {name}" for name in sorted(whole_modules)]
    for name in sorted(names_by_module):
        statements.append(format_import(name, names_by_module[name]))

    standard_library = []
    third_party = []
    for statement in statements:
        top_level_name = re.match(r"(?:import|from) (\w+)", statement)[1]
        if top_level_name in sys.stdlib_module_names:
            standard_library.append(statement)
        else:
            third_party.append(statement)
    return "\n".join(standard_library) + "\n\n" + "\n".join(third_party)


def format_import(module: str, names: set[str]) -> str:
    """Write a `from … import …`, with a line for each name where one line is too short."""
    ordered_names = sorted(names, key=import_order)
    one_line = f"from {module} import {', '.join(ordered_names)}"
    if len(one_line) <= LINE_WIDTH:
        return one_line

    lines = [f"from {module} import ("]
    for name in ordered_names:
        lines.append(f"    {name},")
    lines.append(")")
    return "\n".join(lines)


def import_order(name: str) -> tuple[int, str]:
    """Sort imported names as ruff does: constants, then classes, then functions."""
    if name.isupper():
        return (0, name)
    if name[0].isupper():
        return (1, name)
    return (2, name)


def format_settings(settings: Settings) -> str:
    """Write the settings as Python source, a line for each."""
    lines = ["Settings("]
    for name, value in vars(settings).items():
        source = format_packages(value) if name == "packages" else format_value(value)
        lines.append(f"    {name}={source},")
    lines.append(")")
    return "\n".join(lines)


def format_packages(packages: Sequence[PackageSettings]) -> str:
    """Write the settings of the packages as Python source: a tuple, with a line for each setting."""
    lines = ["("]
    for package in packages:
        lines.append("        PackageSettings(")
        for name, value in vars(package).items():
            lines.append(f"            {name}={format_value(value)},")
        lines.append("        ),")
    lines.append("    )")
    return "\n".join(lines)


def format_value(value: object) -> str:
    """Write text, a number, None, a dataclass, or a tuple of them as Python source."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        items = [format_value(item) for item in value]
        if len(items) == 1:
            return f"({items[0]},)"
        return f"({', '.join(items)})"
    return repr(value)
