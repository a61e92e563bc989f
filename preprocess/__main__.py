"""`python -m preprocess SOURCE… --out data/pairs.parquet`: raw files become pairs.parquet and pairs.rejected.parquet.

Nothing is written before the leak report has passed. The same files in the same order give the same bytes.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import click
import polars as pl

from preprocess import report
from preprocess.core import ledger
from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import atomic_file
from preprocess.dedup.leaks import Leak, find_leaks
from preprocess.dedup.ngrams import normalise
from preprocess.pairs import Pairs, make_pairs
from preprocess.sources.reader import read_prompts
from preprocess.stream import Source, read_facts, write_pairs

OPTIONS_OF_FILES = ("--extra", "--pool", "--against")


class _Command(click.Command):
    """Lets the options of files take several files, as their usage says."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Turn --extra A B into --extra A --extra B, since click takes one value an option."""
        expanded_args = []
        last_option = ""
        previous_arg = ""
        for arg in args:
            is_option = arg.startswith("-")
            follows_its_option = previous_arg == last_option
            if is_option:
                last_option = arg
            elif last_option in OPTIONS_OF_FILES and not follows_its_option:
                # This is a further file of the option: repeat the option before it.
                expanded_args.append(last_option)
            expanded_args.append(arg)
            previous_arg = arg
        return super().parse_args(ctx, expanded_args)


class ShareOrFile(click.ParamType):
    """A share between 0 and 1, or else a file."""

    name = "SHARE|FILE"

    def convert(self, value: str, param: click.Parameter, ctx: click.Context) -> float | Path:
        """Convert the command line's text; a number that is no share is an error."""
        try:
            share = float(value)
        except ValueError:
            return Path(value)
        if not 0 < share < 1:
            self.fail(f"{value}: expected a share between 0 and 1, or a file", param, ctx)
        return share


@click.command(cls=_Command)
@click.argument(
    "sources", nargs=-1, required=True, metavar="SOURCE…", type=click.Path(path_type=Path)
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="pairs.parquet to write."
)
@click.option(
    "--folds", default=5, show_default=True, type=click.IntRange(2, 100), help="Number of folds."
)
@click.option(
    "--threshold",
    default=0.7,
    show_default=True,
    type=click.FloatRange(0.5, 1),
    help="Prompts of this similarity (Jaccard, of character 5-grams) or more share a group, hence a fold.",
)
@click.option(
    "--extra",
    multiple=True,
    metavar="FILE…",
    type=click.Path(path_type=Path),
    help="Files whose rows are trained on, but never validated on, e.g. pairs that models judged.",
)
@click.option(
    "--pool",
    multiple=True,
    metavar="FILE…",
    type=click.Path(path_type=Path),
    help="Files of rows without a verdict, for teachers to label.",
)
@click.option(
    "--test",
    type=ShareOrFile(),
    help="The lockbox, on which nothing is trained: a share of the groups of prompts, or a file.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="FILE…",
    type=click.Path(path_type=Path),
    help="Files, e.g. a test set, that no source may share a prompt with.",
)
@exits_with_2
def main(  # noqa: PLR0913  an argument for each option
    sources: tuple[Path, ...],
    out: Path,
    folds: int,
    threshold: float,
    extra: tuple[Path, ...],
    pool: tuple[Path, ...],
    test: float | Path | None,
    against: tuple[Path, ...],
) -> None:
    """Make pairs with folds from SOURCE…, and check that no prompt leaks from fold to fold or into a test set.

    A source is recognised by its columns: WSDM, LMSYS, Arena, PPE, HelpSteer3 or chosen/rejected, as .parquet, .csv or .jsonl.
    Rows that cannot be used go to a file beside --out, with a reason.
    """
    rejected_path = out.with_name(f"{out.stem}.rejected{out.suffix}")
    inputs = list_sources(sources, extra, pool, test)
    _check_paths([source.path for source in inputs], out, rejected_path, against)
    held_back = {path: read_prompts(path) for path in against}
    rows = read_facts(inputs)
    usable = rows.filter(pl.col("reason").is_null())
    # What the report and the ledger say of rows that are no pairs; not the prompts, which would stay in memory.
    rows = rows.select("file", "source", "role", "reason")

    test_share = test if isinstance(test, float) else 0.0
    pairs = make_pairs(usable, folds, threshold, test_share)
    del usable

    console = report.console()
    console.print(report.sources_table(rows, pairs))
    for line in report.summary(pairs, folds, threshold):
        console.print(line, soft_wrap=True)

    # Nothing is written before this has passed.
    _check_leaks(pairs, held_back, threshold)
    against_names = [path.name for path in against]
    console.print(report.no_leaks(threshold, against_names), soft_wrap=True)

    with atomic_file(rejected_path) as temporary_rejected, atomic_file(out) as temporary:
        write_pairs(inputs, pairs, temporary, temporary_rejected)
    rejected = rows["reason"].count() + pairs.dropped.height
    console.print(
        f"wrote {out} ({pairs.table.height:,} pairs) and {rejected_path} ({rejected:,} rows)",
        soft_wrap=True,
    )

    ledger.record(
        "pairs",
        sources=[
            _describe_file(source.path, rows.filter(file=str(source.path)).height)
            | {"role": source.role}
            for source in inputs
        ],
        against=[_describe_file(path, table.height) for path, table in held_back.items()],
        pairs=out,
        pairs_sha256=ledger.fingerprint(out),
        rows=pairs.table.height,
        rejected=rejected,
    )


def _describe_file(path: Path, row_count: int) -> dict:
    """Return what the ledger says of a raw file."""
    return {"file": path, "sha256": ledger.fingerprint(path), "rows": row_count}


def list_sources(
    sources: Iterable[Path],
    extra: Iterable[Path],
    pool: Iterable[Path],
    test: float | Path | None,
) -> list[Source]:
    """List the files to read, each with what its rows are for.

    The training files come first, because a group is named after the earliest prompt in it.
    """
    inputs = [Source(path, "train") for path in sources]
    inputs += [Source(path, "extra") for path in extra]
    inputs += [Source(path, "pool") for path in pool]
    if isinstance(test, Path):
        inputs.append(Source(test, "test"))
    return inputs


def _check_paths(
    sources: Iterable[Path], out: Path, rejected_path: Path, against: Iterable[Path]
) -> None:
    """Raise UserError where a file would be overwritten or read twice."""
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: expected a name that ends in .parquet")

    used_paths = {out.resolve(), rejected_path.resolve()}
    for path in (*sources, *against):
        if path.resolve() in used_paths:
            raise UserError(
                f"{path}: given twice; a file is either a source, or one to compare with, or the output: name it "
                "once"
            )
        used_paths.add(path.resolve())


def _check_leaks(pairs: Pairs, held_back: dict[Path, pl.DataFrame], threshold: float) -> None:
    """Check that prompts that are alike stand together: in one fold, the lockbox, or one held-back file.

    Args:
        pairs: The pairs with their folds and roles. The lockbox is those that nothing is trained on.
        held_back: The rows of each held-back file.
        threshold: The similarity from which on two prompts are alike.

    Raises:
        UserError: Two such prompts stand apart, so that a model could see in training what it is judged on.
            They are printed first.
    """
    # The search takes a number for each place. A fold has its own: 0, 1, … The lockbox, which is in no
    # fold, gets the number after the last fold's.
    last_fold = pairs.table["fold"].max() or 0
    lockbox = last_fold + 1
    prompts = _list_prompts(pairs, held_back, lockbox)
    leaks = find_leaks(prompts["prompt_text"], prompts["place"].to_numpy(), threshold)
    if not leaks:
        return

    # Show the leaks, and end the command before anything is written.
    report.console(sys.stderr).print(report.leaks_table(leaks, prompts))
    held_back_names = [path.name for path in held_back]
    advice = _advise_on_leaks(leaks, prompts["place"], lockbox, held_back_names)
    raise UserError(
        f"leak report: prompts of similarity {threshold:g} or more stand apart: {'; '.join(advice)}. Nothing was written. "
        f"To accept prompts this much alike, raise --threshold above their similarity"
    )


def _advise_on_leaks(
    leaks: Iterable[Leak], places: pl.Series, lockbox: int, held_back_names: list[str]
) -> list[str]:
    """Count the leaks of each kind, and say what to do about them.

    Args:
        leaks: The leaks.
        places: Where each prompt stands: its fold, the lockbox's number, or below 0 for a held-back
            file.
        lockbox: The number that stands for the lockbox as a place.
        held_back_names: The names of the held-back files.
    """
    into_files = 0
    into_lockbox = 0
    between_folds = 0
    for leak in leaks:
        places_of_leak = (places[leak.first], places[leak.second])
        if min(places_of_leak) < 0:
            into_files += 1
        elif lockbox in places_of_leak:
            into_lockbox += 1
        else:
            between_folds += 1

    advice = []
    if into_lockbox > 0:
        advice.append(
            f"{into_lockbox:,} between sources and the lockbox (remove these rows from one of the two, or let "
            "--test 0.2 draw the lockbox)"
        )
    if into_files > 0:
        file_names = ", ".join(held_back_names)
        advice.append(
            f"{into_files:,} between sources and {file_names} (remove these rows from one of the two)"
        )
    if between_folds > 0:
        advice.append(
            f"{between_folds:,} between folds (the grouping missed them: try a lower --threshold)"
        )
    return advice


def _list_prompts(pairs: Pairs, held_back: dict[Path, pl.DataFrame], lockbox: int) -> pl.DataFrame:
    """List all prompts, those of the pairs first, with the place in which each stands.

    Returns:
        A frame of id, prompt_text (normalised), place (a number, as find_leaks wants it) and
        place_name (for messages). With two folds, a lockbox and two held-back files, the places
        are:

            place_name    fold 0    fold 1    lockbox    test.csv    other.csv
            place              0         1          2          -1           -2
    """
    # A pair without a fold is in the lockbox.
    is_lockbox = pl.col("fold").is_null()
    place = pl.col("fold").fill_null(lockbox).cast(pl.Int64)
    place_name = pl.when(is_lockbox).then(pl.lit("lockbox")).otherwise(pl.format("fold {}", "fold"))
    tables = [pairs.table.select("id", "prompt_text", place=place, place_name=place_name)]

    for file_number, (path, table) in enumerate(held_back.items(), 1):
        normalised = [normalise(turns) for turns in table["prompt"]]
        columns = table.select(
            "id",
            prompt_text=pl.Series(normalised, dtype=pl.String),
            place=pl.lit(-file_number, pl.Int64),
            place_name=pl.lit(path.name),
        )
        tables.append(columns)
    return pl.concat(tables)


if __name__ == "__main__":
    main(prog_name="python -m preprocess")
