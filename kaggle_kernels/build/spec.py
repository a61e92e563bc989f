"""The strict schema of a spec: one Kaggle kernel. Every problem found is told at once, each with its key and the fix."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kaggle_kernels.runtime.settings import PackageSettings, Settings
from preprocess.core.errors import UserError
from preprocess.core.files import read_yaml
from preprocess.core.problems import in_words, unknown_key, without_echo
from recipes.pairwise.config.schema import PATTERNS as RECIPE_PATTERNS
from recipes.pairwise.config.schema import SLUG

SPECS = Path(__file__).parents[1] / "specs"
RUN = r"^[A-Za-z0-9][A-Za-z0-9_./-]*$"
TITLE = r"^[^\"'\\\x00-\x1f]*$"
PATTERNS = {
    **RECIPE_PATTERNS,
    RUN: "a run's name, as in outputs/NAME",
    TITLE: "one line without quotation marks and backslashes",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Competition(_Strict):
    """What a competition calls itself and asks for. A verdict's column stands at the verdict's place."""

    slug: str
    columns: tuple[str, ...]
    verdicts: tuple[str, ...]
    metric: Literal["accuracy", "log_loss"]
    daily_submissions: int  # a team's, in a day of UTC


COMPETITIONS = {
    "wsdm": Competition(
        slug="wsdm-cup-multilingual-chatbot-arena",
        columns=("winner",),
        verdicts=("model_a", "model_b"),
        metric="accuracy",
        daily_submissions=5,
    ),
    "lmsys": Competition(
        slug="lmsys-chatbot-arena",
        columns=("winner_model_a", "winner_model_b", "winner_tie"),
        verdicts=("model_a", "model_b", "tie"),
        metric="log_loss",
        daily_submissions=5,
    ),
}


class PackageBlock(_Strict):
    """One model of a kernel. Base model, quantisation and verdicts are those of the run's recipe."""

    run: str = Field(
        pattern=RUN,
        description="the run that made the package: its folder below outputs/; the recipe has the same name",
    )
    dataset: str = Field(
        pattern=SLUG,
        min_length=6,
        max_length=50,
        description="the Kaggle dataset's slug: the recipe's package.slug",
    )
    weight: float = Field(
        1.0, gt=0, le=1, description="in the mean of the models; the weights sum to 1"
    )
    placement: Literal["auto", "each", "split"] = Field(
        "auto",
        description="each: a copy on every GPU; split: one copy, its layers over both; auto: each if a T4 holds it, else split",
    )


class Spec(_Strict):
    """A kernel's spec."""

    title: str = Field(
        min_length=5,
        max_length=50,
        pattern=TITLE,
        description="the kernel's title on Kaggle; its slug is made from it",
    )
    competition: Literal["wsdm", "lmsys"] = Field(
        description="whose test file is read and whose submission is written"
    )
    packages: tuple[PackageBlock, ...] = Field(
        min_length=1, strict=False, description="the models; several are an ensemble"
    )
    accelerator: Literal["NvidiaTeslaT4"] = Field("NvidiaTeslaT4", description="two T4s")
    clock_seconds: float = Field(
        gt=0, le=43200, description="how long the kernel may take, writing the submission included"
    )
    orders: Literal["as_given", "both"] = Field(
        "both",
        description="both: every row also with its responses swapped, as the clock allows; a reward model needs one",
    )
    budget_tokens: int | None = Field(
        None, ge=64, description="tokens of a row, where they are not to be training's"
    )
    tokens_per_batch: int = Field(
        8192, ge=64, description="tokens of a batch, padding included; halved where memory runs out"
    )
    temperature: float = Field(
        1.0, gt=0, le=10, description="of the final probabilities; above 1: less sure"
    )
    min_scored: float = Field(
        0.98,
        gt=0,
        le=1,
        description="the share of rows that must have a score, else nothing is submitted",
    )
    visible_rows: int = Field(
        512,
        ge=0,
        description="rows of the train file's validation fold that the visible run scores to predict the hidden one",
    )
    wheels: str | None = Field(
        None,
        pattern=SLUG,
        min_length=6,
        max_length=50,
        description="the dataset with bitsandbytes, for nf4 and int8; gptq4 and gptq8 need none",
    )

    @field_validator("title")
    @classmethod
    def _title_makes_a_slug(cls, title):
        if len(slugify(title)) < 5:
            raise ValueError(
                f"its slug would be {slugify(title)!r}, Kaggle wants 5 characters or more"
            )
        return title

    @field_validator("packages")
    @classmethod
    def _packages_differ_and_weights_sum_to_one(cls, packages):
        total = sum(package.weight for package in packages)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights sum to {total:g}, expected 1")
        for key in ("run", "dataset"):
            if len({getattr(package, key) for package in packages}) < len(packages):
                raise ValueError(f"two packages have the same {key}")
        return packages

    @model_validator(mode="after")
    def _a_batch_holds_a_row(self):
        if self.budget_tokens and self.budget_tokens > self.tokens_per_batch:
            raise ValueError(
                f"budget_tokens: {self.budget_tokens} is more than tokens_per_batch, {self.tokens_per_batch}"
            )
        return self

    @model_validator(mode="after")
    def _wheels_are_no_package(self):
        if self.wheels in {package.dataset for package in self.packages}:
            raise ValueError(
                f"wheels: {self.wheels} is a package's dataset; name the one with bitsandbytes, pairwise-wheels"
            )
        return self

    @property
    def slug(self) -> str:
        """The kernel's slug on Kaggle."""
        return slugify(self.title)


def slugify(title: str) -> str:
    """Kaggle's slug of a title: lower case, whatever is no letter or digit a hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def find_spec(name: str) -> Path:
    """The spec's file, given as a path or by its name."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else SPECS / f"{name}.yml"
    if not path.is_file():
        raise UserError(
            f"{name}: no such spec; there are {', '.join(known.stem for known in all_specs())}, or give a file"
        )
    return path


def all_specs() -> list[Path]:
    """The project's specs, by name."""
    return sorted(SPECS.glob("*.yml"))


def read_spec(path: Path) -> Spec:
    """Read and check a spec; every problem found is in one UserError."""
    values = read_yaml(path)
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        inside = any(
            problem["loc"][:1] == ("packages",) and len(problem["loc"]) > 1
            for problem in error.errors()
        )
        told = [
            p for p in error.errors() if not (inside and p["loc"] == ("packages",))
        ]  # "too short" for want of a good one
        told = without_echo(told, [*Spec.model_fields, *PackageBlock.model_fields])
        raise UserError(f"{path}: " + "; ".join(map(_explain, told))) from None


def _explain(problem: dict) -> str:
    key, known = (
        ".".join(str(part) for part in problem["loc"]),
        PackageBlock if len(problem["loc"]) > 1 else Spec,
    )
    if problem["type"] == "extra_forbidden":
        return f"{key}: {unknown_key(problem['loc'][-1], known.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: missing; add it: {known.model_fields[problem['loc'][-1]].description}"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    return f"{key}: {in_words(problem, PATTERNS)}"


def settings_of(name: str, spec: Spec, packages: Sequence[PackageSettings]) -> Settings:
    """What the kernel of the spec named `name` is told; see fit.package_settings for its packages."""
    competition = COMPETITIONS[spec.competition]
    return Settings(
        name=name,
        competition=competition.slug,
        columns=competition.columns,
        verdicts=competition.verdicts,
        packages=tuple(packages),
        orders=("as_given", "swapped") if spec.orders == "both" else ("as_given",),
        clock_seconds=spec.clock_seconds,
        budget_tokens=spec.budget_tokens,
        tokens_per_batch=spec.tokens_per_batch,
        temperature=spec.temperature,
        min_scored=spec.min_scored,
        visible_rows=spec.visible_rows,
        wheels=spec.wheels,
    )
