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

    run.json holds everything that decides what the checkpoints beside it were trained as.

    Args:
        cfg: Axolotl's configuration: its output folder, and whether it resumes; of
            `auto_resume_from_checkpoints` it becomes the newest complete checkpoint.
        block: The `pairwise:` block, with the environment's overrides.
        recipe_keys: The recipe's keys as they run.

    Raises:
        UserError: If the checkpoints are of another training.
    """
    folder = Path(cfg.output_dir)
    identity = {name: value for name, value in recipe_keys.items() if name not in RESUME_KEYS}
    identity["pairwise"] = block.model_dump(mode="json")
    identity["content of pairwise.pairs"] = sha256(block.pairs)

    if cfg.auto_resume_from_checkpoints and not cfg.resume_from_checkpoint:
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


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint in a run folder: transformers writes its state last."""
    complete = [state.parent for state in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    if not complete:
        return None
    return str(
        max(complete, key=lambda checkpoint: int(checkpoint.name.removeprefix("checkpoint-")))
    )


def find_differing_keys(file: Path, identity: dict) -> list[str]:
    """Return the keys whose values differ from those in a run.json; of none that is known, all."""
    recorded = read_json(file) if file.exists() else {}
    keys = sorted(identity.keys() | recorded.keys())
    return [key for key in keys if identity.get(key) != recorded.get(key)]
