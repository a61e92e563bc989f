"""The strict schema of a spec, the YAML file that describes one Kaggle kernel, and its reader.

Every command of kaggle_kernels reads its spec here. All mistakes of a file are reported at once, each with its key and the
fix. spec.schema.json, which editors use, is generated from the same models (see json_schema.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from slugify import slugify

from kaggle_kernels.runtime.settings import PackageSettings, Settings, TimeLimit, find_time_limit
from preprocess.competitions import COMPETITIONS, LONGEST_SECONDS
from preprocess.core.errors import UserError
from preprocess.core.files import read_yaml
from preprocess.core.problems import in_words, unknown_key, without_echo
from recipes.pairwise.config.schema import PATTERNS as RECIPE_PATTERNS
from recipes.pairwise.config.schema import SLUG

SPECS = Path(__file__).parents[1] / "specs"

# Kaggle's limits for a title, in characters. The slug that is made of the title has the same lower limit.
SHORTEST_TITLE = 5
LONGEST_TITLE = 50

# How far the sum of the weights may be from 1.
WEIGHT_TOLERANCE = 1e-6

RUN = r"^[A-Za-z0-9][A-Za-z0-9_./-]*$"
TITLE = r"^[^\"'\\\x00-\x1f]*$"
# What each regular expression asks for, in the words of an error message.
PATTERNS = RECIPE_PATTERNS | {
    RUN: "a run's name, as in outputs/NAME",
    TITLE: "one line without quotation marks and backslashes",
}


class _Strict(BaseModel):
    # An unknown key is an error, and so is a value of another type: "0.5" in quotes is no number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# In which orders of its two responses the kernel scores a row, by the spec's `orders`.
ORDERS = {"as_given": ("as_given",), "both": ("as_given", "swapped")}


class PackageBlock(_Strict):
    """One model of a kernel. The run's recipe says its base model, quantisation and verdicts."""

    run: str = Field(
        pattern=RUN,
        description="the run that made the package: its folder in outputs/; its recipe has the same name",
    )
    dataset: str = Field(
        pattern=SLUG,
        min_length=6,
        max_length=50,
        description="the Kaggle dataset's slug: the recipe's package.slug",
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1,
        description="the model's weight in the mean of all models; the weights sum to 1",
    )
    placement: Literal["auto", "each", "split"] = Field(
        "auto",
        description="each: a copy on every GPU; split: one copy, its layers over both; auto: each if a T4 holds it, else split",
    )


# In YAML: seconds, or seconds by the largest number of rows that they are for; null: any more.
_SECONDS_SCHEMA = {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_SECONDS}
TimeLimits = Annotated[
    dict[int | None, float],
    WithJsonSchema(
        {"anyOf": [_SECONDS_SCHEMA, {"type": "object", "additionalProperties": _SECONDS_SCHEMA}]}
    ),
]

CompetitionName = Annotated[str, WithJsonSchema({"type": "string", "enum": list(COMPETITIONS)})]


class Spec(_Strict):
    """A spec: one kernel, what it serves and how."""

    # What Kaggle runs, and where.
    title: str = Field(
        min_length=SHORTEST_TITLE,
        max_length=LONGEST_TITLE,
        pattern=TITLE,
        description="the kernel's title on Kaggle; its slug is made from it",
    )
    competition: CompetitionName = Field(
        description="the competition whose test file is read and whose submission is written"
    )
    packages: tuple[PackageBlock, ...] = Field(
        min_length=1, strict=False, description="the models; several are an ensemble"
    )
    # How the rows are scored.
    clock_seconds: TimeLimits | None = Field(
        None,
        description="how long the kernel may take: seconds, or seconds by rows up to; by default the competition's limits",
    )
    orders: Literal["as_given", "both"] = Field(
        "both",
        description="both: every row also with its responses swapped, if time allows; a reward model is run once all the same",
    )
    budget_tokens: int | None = Field(
        None, ge=64, description="tokens of a row at most; by default those of training"
    )
    tokens_per_batch: int = Field(
        8192, ge=64, description="tokens of a batch, padding included; halved when memory runs out"
    )
    temperature: float | None = Field(
        None,
        gt=0,
        le=10,
        description="temperature of the final probabilities; above 1 makes them less confident; by default that measured for a "
        "single model that answers with probabilities, else 1",
    )
    # What is submitted, and what is tried out before.
    min_scored: float = Field(
        0.98,
        gt=0,
        le=1,
        description="the share of rows that should be scored; fewer are an error in the visible run, a warning in the hidden",
    )
    visible_rows: int = Field(
        512,
        ge=0,
        description="rows of the train file's validation fold that the visible run scores, to predict the hidden run",
    )
    # What Kaggle's image lacks.
    wheels: str | None = Field(
        None,
        pattern=SLUG,
        min_length=6,
        max_length=50,
        description="the dataset with the wheel of bitsandbytes, for nf4 and int8; gptq4 and gptq8 need none",
    )

    @field_validator("competition")
    @classmethod
    def _check_competition(cls, name: str) -> str:
        if name not in COMPETITIONS:
            raise ValueError(f"expected {' or '.join(COMPETITIONS)}, found {name!r}")
        return name

    @field_validator("clock_seconds", mode="before")
    @classmethod
    def _read_time_limits(cls, value: object) -> object:
        if value is None:
            return None

        # A number holds for any number of rows. A mapping such as {10000: 16200, null: 32400} has the
        # limit of up to 10,000 rows, and behind null that of any more.
        seconds_by_rows = value if isinstance(value, dict) else {None: value}
        for rows, seconds in seconds_by_rows.items():
            is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not is_number or not 0 < seconds <= LONGEST_SECONDS:
                raise ValueError(
                    f"expected seconds above 0 and up to {LONGEST_SECONDS:g}, found {seconds!r}"
                )
            if rows is not None and (not isinstance(rows, int) or rows < 1):
                raise ValueError(f"expected a number of rows, or null for any more, found {rows!r}")

        if None not in seconds_by_rows:
            raise ValueError(
                "a test file may have more rows than any limit here is for; add null: SECONDS"
            )
        return seconds_by_rows

    @field_validator("title")
    @classmethod
    def _check_slug_length(cls, title: str) -> str:
        # Kaggle makes the slug of the title, and refuses a short one.
        slug = slugify(title)
        if len(slug) < SHORTEST_TITLE:
            raise ValueError(
                f"Kaggle would make the slug {slug!r} of it, which needs {SHORTEST_TITLE} characters or more; "
                "give a longer title"
            )
        return title

    @field_validator("packages")
    @classmethod
    def _check_weights_and_names(cls, packages: tuple[PackageBlock, ...]):
        # The kernel takes the weighted mean of the models' probabilities, which has to sum to 1 again.
        total_weight = sum(package.weight for package in packages)
        if abs(total_weight - 1) > WEIGHT_TOLERANCE:
            raise ValueError(f"the weights sum to {total_weight:g}, expected 1")

        # The kernel tells its models apart by run, and Kaggle mounts a dataset once.
        for key in ("run", "dataset"):
            distinct_values = {getattr(package, key) for package in packages}
            if len(distinct_values) < len(packages):
                raise ValueError(f"two packages have the same {key}; each needs one of its own")

        return packages

    @model_validator(mode="after")
    def _check_wheels_are_no_package(self):
        package_datasets = [package.dataset for package in self.packages]
        if self.wheels in package_datasets:
            raise ValueError(
                f"wheels: found {self.wheels}, which is the dataset of a package; name the one with the wheel of "
                "bitsandbytes, e.g. pairwise-wheels"
            )
        return self

    @property
    def time_limits(self) -> tuple[TimeLimit, ...]:
        """The kernel's time limits by ascending number of rows, its own or its competition's."""
        seconds_by_rows = self.clock_seconds or COMPETITIONS[self.competition].time_limits
        row_numbers = sorted(rows for rows in seconds_by_rows if rows is not None)
        return tuple(TimeLimit(rows, float(seconds_by_rows[rows])) for rows in [*row_numbers, None])

    def time_limit(self, rows: int) -> float:
        """Return the seconds that the kernel may take for a test file of so many rows."""
        return find_time_limit(self.time_limits, rows)

    @property
    def slug(self) -> str:
        """The kernel's slug, as Kaggle makes it of the title: with another one, the kernel would land elsewhere."""
        return slugify(self.title)


def all_specs() -> list[Path]:
    """List the project's own specs, sorted by name."""
    return sorted(SPECS.glob("*.yml"))


def find_spec(name: str) -> Path:
    """Find a spec's file by its name, as in kaggle_kernels/specs/NAME.yml, or by its path."""
    is_path = name.endswith((".yml", ".yaml"))
    path = Path(name) if is_path else SPECS / f"{name}.yml"
    if not path.is_file():
        existing_names = ", ".join(spec.stem for spec in all_specs())
        raise UserError(f"{name}: no such spec; there are {existing_names}, or give a file")
    return path


def read_spec(path: Path) -> Spec:
    """Read and check a spec; one UserError holds all its mistakes."""
    values = read_yaml(path)
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        problems = _without_consequences(error.errors())
        messages = [_explain(problem) for problem in problems]
        raise UserError(f"{path}: " + "; ".join(messages)) from None


def _without_consequences(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out the problems that vanish once another one of the list is fixed."""
    # Pydantic does not count a package with a mistake, and then calls the list of packages too short.
    if any(_is_of_a_package(problem) for problem in problems):
        problems = [problem for problem in problems if problem["loc"] != ("packages",)]

    # A mistyped key is unknown, and the key that was meant is missing.
    known_keys = [*Spec.model_fields, *PackageBlock.model_fields]
    return without_echo(problems, known_keys)


def _is_of_a_package(problem: ErrorDetails) -> bool:
    """Whether a problem is about a package, rather than about the spec or its list of packages."""
    location = problem["loc"]
    return len(location) > 1 and location[0] == "packages"


def _explain(problem: ErrorDetails) -> str:
    """Describe one of pydantic's problems: its key, what is wrong, and what to write."""
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    fields = PackageBlock.model_fields if _is_of_a_package(problem) else Spec.model_fields

    if problem["type"] == "extra_forbidden":
        return f"{key}: {unknown_key(location[-1], fields)}"

    if problem["type"] == "missing":
        return f"{key}: missing; add it: {fields[location[-1]].description}"

    # Our own validators. Those of the whole spec name the key themselves.
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message

    return f"{key}: {in_words(problem, PATTERNS)}"


def settings_of(
    name: str, spec: Spec, packages: Sequence[PackageSettings], temperature: float = 1.0
) -> Settings:
    """Collect the settings that a spec's kernel runs with."""
    competition = COMPETITIONS[spec.competition]
    return Settings(
        name=name,
        competition=competition.slug,
        verdicts=competition.verdicts,
        texts_are_turns=competition.texts_are_turns,
        verdict_form=competition.verdict_form,
        verdict_columns=competition.verdict_columns,
        answer=competition.answer,
        columns=competition.columns,
        metric=competition.metric,
        hidden_rows=competition.hidden_rows,
        packages=tuple(packages),
        orders=ORDERS[spec.orders],
        time_limits=spec.time_limits,
        budget_tokens=spec.budget_tokens,
        tokens_per_batch=spec.tokens_per_batch,
        temperature=temperature,
        min_scored=spec.min_scored,
        visible_rows=spec.visible_rows,
        wheels=spec.wheels,
    )
