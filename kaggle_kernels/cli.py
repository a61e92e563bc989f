"""The command `pairwise`: the whole chain, in the order in which it is used.

Every command is the one that its `python -m …` form runs, imported only when it is called, so that
`pairwise --help` and shell completion answer at once. pyproject.toml names `main` as the console script.
"""

import importlib
from dataclasses import dataclass

import click
from click.shell_completion import CompletionItem


@dataclass(frozen=True)
class Entry:
    """One command of the chain.

    Attributes:
        name: What the user types after `pairwise`.
        target: Where the click command is defined, as "module:attribute".
        summary: Its line in the list of commands.
    """

    name: str
    target: str
    summary: str


CHAIN = (
    Entry("new", "kaggle_kernels.__main__:new", "Write a recipe and a spec for a base model."),
    Entry("preprocess", "preprocess.__main__:main", "Raw files to pairs.parquet."),
    Entry("check", "recipes.pairwise.__main__:main", "Check recipes, without training."),
    Entry("train", "recipes.pairwise.train:main", "Train a recipe with Axolotl on this machine."),
    Entry("cv", "recipes.pairwise.cv:main", "Train every fold and join the out-of-fold rows."),
    Entry("labels", "postprocess.labels.__main__:main", "Label rows with a teacher, for students."),
    Entry("make", "recipes.pairwise.graph.make:main", "Bring a run and all it needs up to date."),
    Entry("package", "postprocess.__main__:main", "Merge, quantise, compare and package a run."),
    Entry("wheels", "postprocess.wheels.__main__:main", "Make the dataset of wheels for Kaggle."),
    Entry("report", "postprocess.report.__main__:main", "Write a run's report, one HTML page."),
    Entry("sweep", "postprocess.sweep:main", "Rank the trials of a hyperparameter sweep."),
    Entry("list", "kaggle_kernels.__main__:list_specs", "List the kernel specs."),
    Entry("build", "kaggle_kernels.__main__:build", "Build kernels from their specs."),
    Entry("rehearse", "kaggle_kernels.__main__:rehearse", "Run a kernel here as Kaggle would."),
    Entry("weigh", "kaggle_kernels.__main__:weigh", "Fit the weights of an ensemble."),
    Entry("smoke", "kaggle_kernels.__main__:smoke", "Try publishing on your Kaggle account."),
    Entry("push", "kaggle_kernels.__main__:push", "Publish datasets and kernel on Kaggle."),
    Entry("status", "kaggle_kernels.__main__:status", "Follow the kernel's run on Kaggle."),
    Entry("submit", "kaggle_kernels.__main__:submit", "Submit the kernel to the competition."),
    Entry("scores", "kaggle_kernels.__main__:scores", "List submissions with their scores."),
    Entry("trace", "kaggle_kernels.__main__:trace", "Trace a submission back to its raw files."),
)


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is called."""

    def __init__(self, entries: tuple[Entry, ...], **options):
        super().__init__(**options)
        self.entries = {entry.name: entry for entry in entries}

    def list_commands(self, context: click.Context) -> list[str]:
        """List the names in the order of the chain, not of the alphabet."""
        return list(self.entries)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import the command `name`; None where there is no such command."""
        entry = self.entries.get(name)
        if entry is None:
            return None

        module_name, attribute = entry.target.split(":")
        module = importlib.import_module(module_name)
        return getattr(module, attribute)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands for --help from the summaries, without importing anything."""
        rows = [(entry.name, entry.summary) for entry in self.entries.values()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name from the table; click's own way would import every command."""
        items = click.Command.shell_complete(self, context, incomplete)
        for entry in self.entries.values():
            if entry.name.startswith(incomplete):
                items.append(CompletionItem(entry.name, help=entry.summary))
        return items


main = LazyGroup(
    CHAIN,
    name="pairwise",
    help="Preference training from raw file to Kaggle submission; the commands in order of use.",
    epilog='Shell completion: eval "$(_PAIRWISE_COMPLETE=bash_source pairwise)", or zsh_source.',
)

if __name__ == "__main__":
    main(prog_name="pairwise")
