"""Whose checkpoints stand in a run folder: a run resumes only from those of the same training."""

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from preprocess.core.errors import UserError
from preprocess.core.files import read_json, sha256, write_json
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.processes import is_first_on_machine

IDENTITY_FILE = "run.json"
RESUME_KEYS = ("auto_resume_from_checkpoints", "resume_from_checkpoint")


def check_resume(cfg, block: PairwiseBlock, recipe_keys: dict) -> None:
    """Check whose checkpoints the run would resume from; then write run.json for those to come.

    run.json, in the run folder, holds everything that decides what its checkpoints are trained as. Where
    `cfg` asks to resume from the last checkpoint, it is given the path of that checkpoint instead.

    Raises:
        UserError: If the checkpoints are of another training.
    """
    folder = Path(cfg.output_dir)
    identity = describe_training(block, recipe_keys)

    resumes_from_last = cfg.auto_resume_from_checkpoints and not cfg.resume_from_checkpoint
    if resumes_from_last:
        # Axolotl would take the newest folder, which a kill may have left half written.
        cfg.resume_from_checkpoint = newest_checkpoint(folder)
        cfg.auto_resume_from_checkpoints = False

    if cfg.resume_from_checkpoint:
        differing = find_differing_keys(folder / IDENTITY_FILE, identity)
        if differing:
            raise UserError(
                f"{folder}: its checkpoints were trained with another {', '.join(differing)}; "
                "remove them, or do not resume"
            )

    if is_first_on_machine():
        write_json(folder / IDENTITY_FILE, identity)


def describe_training(block: PairwiseBlock, recipe_keys: dict) -> dict:
    """Return all that decides what a run trains: its recipe's keys, and a hash of its pairs file."""
    # Whether a run resumes does not change what it trains.
    identity = {name: value for name, value in recipe_keys.items() if name not in RESUME_KEYS}
    identity["pairwise"] = block.model_dump(mode="json")
    identity["content of pairwise.pairs"] = sha256(block.pairs)
    return identity


def newest_checkpoint(folder: Path) -> str | None:
    """Return the path of the newest complete checkpoint in a run folder, None where there is none."""
    # transformers writes this file last, so that a checkpoint which has it is complete.
    complete = {}
    for state_file in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        step = int(state_file.parent.name.removeprefix("checkpoint-"))
        complete[step] = str(state_file.parent)
    return complete[max(complete)] if complete else None


def find_differing_keys(file: Path, identity: dict) -> list[str]:
    """List the keys of a training that differ from those in a run.json; without the file, all."""
    recorded = read_json(file) if file.exists() else {}
    keys = sorted(identity.keys() | recorded.keys())
    return [key for key in keys if identity.get(key) != recorded.get(key)]
