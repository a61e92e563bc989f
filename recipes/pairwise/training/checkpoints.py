"""Whose checkpoints stand in a run folder: a run goes on only from those of the same rows and settings."""

from pathlib import Path

from preprocess.core.errors import UserError
from preprocess.core.files import read_json, sha256, write_json
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.processes import is_first_on_machine


def check_resume(cfg, block: PairwiseBlock, recipe: Path) -> None:
    """Check whose checkpoints the run would go on from; then write run.json for those to come.

    run.json says of whose rows and settings the checkpoints beside it are.

    Args:
        cfg: Axolotl's configuration: its output folder, and whether it resumes.
        block: The recipe's `pairwise:` block.
        recipe: The recipe's file, for the message.

    Raises:
        UserError: If the checkpoints are of other rows or settings.
    """
    folder = Path(cfg.output_dir)
    identity = {
        "fold": block.fold,
        "pairs_sha256": sha256(block.pairs),
        "block": block.model_dump(mode="json"),
    }

    resumes = cfg.resume_from_checkpoint or cfg.auto_resume_from_checkpoints
    if resumes and any(folder.glob("checkpoint-*")):
        file = folder / "run.json"
        is_same_run = file.exists() and read_json(file) == identity
        if not is_same_run:
            raise UserError(
                f"{folder}: its checkpoints were trained with another fold, other pairs or another pairwise block than "
                f"{recipe} has now; remove them, or do not resume"
            )

    if is_first_on_machine():
        write_json(folder / "run.json", identity)
