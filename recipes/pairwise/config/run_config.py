"""The configuration of the run that Axolotl is about to start: checked first, then completed.

Called by the plugin's first hook, `register`, where `cfg` is still a plain dict of the recipe's keys with the command line's
overrides. A mistake is a UserError here, a minute before Axolotl would load a model and show a traceback.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from preprocess.core.errors import UserError
from preprocess.core.files import read_yaml
from recipes.pairwise.config.axolotl_keys import REFUSED, count_accumulation_steps
from recipes.pairwise.config.earlier_runs import (
    EarlierRun,
    HeadStart,
    check_adapter_start,
    find_earlier_run,
    has_classifier,
)
from recipes.pairwise.config.model_checks import (
    build_empty_model,
    check_config,
    check_layers,
    check_vocabulary,
    list_head_modules,
    read_config,
    warn_of_home_path,
    warn_of_unserved_model,
)
from recipes.pairwise.config.schema import (
    PairwiseBlock,
    apply_environment,
    recipe_problems,
    run_folder,
)
from recipes.pairwise.processes import is_first_on_machine
from recipes.pairwise.training.output_layer import CLASSIFIER_HEADS

INSTEAD = {
    "merge-lora": "it would lose the head without a word; use python -m postprocess RECIPE",
    "quantize": "it loads a causal model and loses the head; use python -m postprocess RECIPE",
    "evaluate": "it ignores this plugin's datasets; metrics.json and predictions.parquet are written by axolotl train",
    "inference": "a classifier does not generate text; use python -m kaggle_kernels rehearse SPEC --test FILE",
    "lm-eval": "a classifier does not generate text; use python -m kaggle_kernels rehearse SPEC --test FILE",
}
OVERRIDABLE = (*REFUSED, "attn_implementation", "base_model", "wandb_project")


def refuse_other_commands(command_line: Sequence[str]) -> None:
    """Raise UserError where `command_line` (sys.argv) is a command of Axolotl's that would lose or misuse the head."""
    # Axolotl's launchers run `python -m axolotl.cli.merge_lora`; its console script gets `axolotl merge-lora`.
    command = Path(command_line[0]).stem.replace("_", "-")
    if command == "axolotl" and len(command_line) > 1:
        command = command_line[1]
    if command in INSTEAD:
        raise UserError(f"axolotl {command}: refused, {INSTEAD[command]}")


def check_run(cfg: dict, recipe: Path) -> PairwiseBlock:
    """Check a run's keys, and return its `pairwise:` block with what the environment changes in it.

    Raises:
        UserError: A key is wrong, or the recipe trains nothing. One message names all problems.
    """
    problems = list_key_problems(cfg, recipe)
    if problems:
        raise UserError(f"{recipe}: " + "; ".join(problems))

    block = apply_environment(PairwiseBlock.model_validate(dict(cfg["pairwise"])))
    if not block.train:
        raise UserError(
            f"{recipe}: pairwise.train is false, so there is nothing to train; package the base model with "
            f"python -m postprocess {recipe}"
        )
    return block


def list_key_problems(cfg: dict, recipe: Path) -> list[str]:
    """List what is wrong with a run's keys, one sentence a problem.

    The recipe's file is checked, not `cfg`: Axolotl has added keys of its own to `cfg`, and each of
    them would be reported as unknown.
    """
    # Without the file, only the keys that are always refused can be told from Axolotl's own.
    if not recipe.is_file():
        return [f"{key}: refused, {reason}" for key, reason in REFUSED.items() if cfg.get(key)]

    # The command line may have replaced a value of the file, as `axolotl train RECIPE --base-model X`
    # does. `cfg` holds what counts.
    values = read_yaml(recipe)
    for key in OVERRIDABLE:
        if cfg.get(key) is not None:
            values[key] = cfg[key]
    return recipe_problems(values)


def check_base_model(cfg: dict, block: PairwiseBlock):
    """Check that the base model has what the recipe asks of it.

    Returns:
        The base model with its head, built without weights.
    """
    model_config = read_config(cfg["base_model"], cfg.get("revision_of_model"))
    if is_first_on_machine():
        warn_of_home_path(cfg["base_model"])
        warn_of_unserved_model(model_config.model_type, block.head)

    # Axolotl has two names for this key, and may have replaced the first by the second.
    overrides = cfg.get("model_config") or cfg.get("overrides_of_model_config") or {}
    check_config(model_config, block, overrides)
    model = build_empty_model(model_config, block.head)
    check_layers(
        model, targets=cfg.get("lora_target_modules"), saved=cfg.get("lora_modules_to_save")
    )

    # The head label_tokens needs the layer that predicts tokens. A classifier's checkpoint has none,
    # unless that layer shares its weights with the embedding. transformers would make a random one.
    is_classifier = has_classifier(model_config)
    lacks_token_layer = is_classifier and not model_config.tie_word_embeddings
    if block.head == "label_tokens" and lacks_token_layer:
        raise UserError(
            f"base_model: {cfg['base_model']} is a classifier ({model_config.architectures[0]}), which cannot predict the "
            "answer tokens of head: label_tokens; set pairwise.head to score or reward"
        )
    return model


def check_start(cfg: dict, block: PairwiseBlock) -> EarlierRun | None:
    """Find the run that this one goes on from, and check that it can; None where it starts from a base model."""
    earlier = find_earlier_run(cfg["base_model"], cfg.get("lora_model_dir"))
    if cfg.get("lora_model_dir"):
        check_adapter_start(cfg, block, earlier)
    return earlier


def check_tokenizer(cfg, tokenizer, model_config) -> None:
    """Raise UserError where the tokenizer is not a fast one, has no pad token, or a special token that the model lacks."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"base_model: {cfg.base_model} has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token_id is None:
        raise UserError(
            "special_tokens: the tokenizer has no pad token; set special_tokens: {pad_token: …} in the recipe"
        )
    vocabulary_size = model_config.get_text_config().vocab_size
    check_vocabulary(cfg.special_tokens or {}, tokenizer, cfg.base_model, vocabulary_size)


def set_model_keys(cfg: dict, block: PairwiseBlock, model, head_start: HeadStart) -> None:
    """Set the keys that follow from the base model: attn_implementation, num_labels and lora_modules_to_save."""
    # SDPA, the faster one, ignores a soft cap, and some models of transformers do not support it.
    if not cfg.get("attn_implementation"):
        needs_eager = block.softcap or not model._supports_sdpa
        cfg["attn_implementation"] = "eager" if needs_eager else "sdpa"

    # The head label_tokens is the layer that predicts tokens. The rest is about classification heads.
    if block.head == "label_tokens":
        return

    # The checkpoint's head may have other outputs than this run's. transformers would load it only if
    # it were told to ignore wrong shapes, and then it would ignore them in every layer. So the head is
    # loaded as it was saved, and the plugin replaces it afterwards.
    if head_start.checkpoint_outputs is not None:
        cfg["num_labels"] = head_start.checkpoint_outputs

    if cfg.get("adapter"):
        add_head_modules(cfg, model)


def add_head_modules(cfg: dict, model) -> None:
    """Add the modules of a classification head to lora_modules_to_save, where PEFT would leave them out.

    PEFT trains and saves the last layer of a classifier by itself, whether its name is score or
    classifier. The head of an encoder may have more: of ["pooler", "classifier"], the pooler is added
    here. It may start from random values too. PEFT would neither train it nor write it into the
    adapter's file.
    """
    recipe_modules = list(cfg.get("lora_modules_to_save") or [])
    covered_modules = {*CLASSIFIER_HEADS, *recipe_modules}
    missing_modules = set(list_head_modules(model)) - covered_modules
    if missing_modules:
        cfg["lora_modules_to_save"] = recipe_modules + sorted(missing_modules)


def set_accumulation_steps(cfg: dict, block: PairwiseBlock) -> None:
    """Set gradient_accumulation_steps so that a step has pairs_per_step pairs, for any number of processes.

    For 64 pairs a step, micro-batches of 2 pairs on 8 processes make it 64 / (2 * 8) = 4.

    Raises:
        UserError: The processes cannot share the pairs evenly, or the command line says otherwise.
    """
    if block.pairs_per_step is None:
        return

    # torchrun tells each process in WORLD_SIZE how many there are. With Ray this runs before any of
    # them is started, so that the number comes from the recipe.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.get("use_ray"):
        processes = cfg.get("ray_num_workers") or 1

    steps = count_accumulation_steps(
        block.pairs_per_step, cfg.get("micro_batch_size") or 1, processes
    )
    given_steps = cfg.get("gradient_accumulation_steps")
    if given_steps not in (None, steps):
        raise UserError(
            f"gradient_accumulation_steps: {given_steps}, but pairwise.pairs_per_step makes it "
            f"{steps}; remove one of the two"
        )
    cfg["gradient_accumulation_steps"] = steps


def set_fixed_keys(
    cfg: dict, block: PairwiseBlock, recipe: Path, checkpointing: dict[str, bool]
) -> None:
    """Set the keys that are the same for every recipe, or follow from the `pairwise:` block."""
    cfg["output_dir"] = str(run_folder(cfg.get("output_dir"), recipe))
    if block.head == "label_tokens":
        cfg["model_type"] = "AutoModelForCausalLM"
    else:
        cfg["model_type"] = "AutoModelForSequenceClassification"
        cfg["num_labels"] = 1 if block.head == "reward" else len(block.verdicts)

    # Axolotl refuses a configuration without datasets. This one is never read: the plugin's hook
    # load_datasets returns the real ones.
    cfg["datasets"] = [{"path": "pairwise", "type": "completion"}]
    cfg["sequence_len"] = block.budget_tokens
    if cfg.get("gradient_checkpointing"):
        cfg["gradient_checkpointing_kwargs"] = checkpointing
