"""The source files that decide the result of each stage in pipeline.py.

An edit of one of them makes the stage out of date; an edit of any other file does not. Paths are
relative to the root of the repository, and a folder stands for every Python file in it.
tests/postprocess/test_staleness.py compares these lists with what the stages import.
"""

MODEL_INPUT = "preprocess/model_input.py"

# Which files and which base model a run consists of.
RUN = (MODEL_INPUT, "postprocess/run_folder.py", "kaggle_kernels/runtime/package.py")

# The class that a head is loaded with. Merging writes weights under the names that this class has.
MODEL_CLASS = (
    "kaggle_kernels/runtime/models/fused.py",
    "kaggle_kernels/runtime/models/gptq.py",
    "kaggle_kernels/runtime/models/model.py",
    "kaggle_kernels/runtime/models/shortcuts.py",
)

# Everything that Kaggle's kernel loads and scores a model with.
SCORING = ("kaggle_kernels/runtime/models",)

# On which devices models are loaded.
DEVICES = ("kaggle_kernels/runtime/models/placement.py", "postprocess/agreement/devices.py")

# The model as trained, beside which a package is compared.
REFERENCE = (
    *DEVICES,
    "postprocess/agreement/reference_model.py",
    "recipes/pairwise/training/heads.py",
    "recipes/pairwise/training/output_layer.py",
    "recipes/pairwise/training/zero3.py",
)

# The rows of a pairs file, and the metrics on them.
PAIRS = (
    "recipes/pairwise/data/datasets.py",
    "recipes/pairwise/data/teacher_labels.py",
    "recipes/pairwise/tracking/metrics.py",
)

# Base and adapter into one model, in 16 bits or quantised in the same pass.
MERGE = (
    *RUN,
    *MODEL_CLASS,
    "postprocess/weights/bnb_quantize.py",
    "postprocess/weights/checkpoint_reader.py",
    "postprocess/weights/lora_adapter.py",
    "postprocess/weights/merge.py",
    "postprocess/weights/meta_model.py",
    "postprocess/weights/shard_writer.py",
    "postprocess/weights/smooth_quant.py",
)

# nf4 and int8, which are calibrated on training rows.
QUANTISE = (
    *MERGE,
    *PAIRS,
    *DEVICES,
    "kaggle_kernels/runtime/models/overflow.py",
    "kaggle_kernels/runtime/models/scoring.py",
    "postprocess/agreement/validation_rows.py",
    "postprocess/weights/calibration.py",
    "postprocess/weights/quantise_run.py",
)

GPTQ = (
    *MERGE,
    *PAIRS,
    "kaggle_kernels/runtime/models/overflow.py",
    "kaggle_kernels/runtime/models/scoring.py",
    "postprocess/agreement/validation_rows.py",
    "postprocess/gptq",
    "postprocess/weights/calibration.py",
    "postprocess/gptq/requirements.txt",
)

# The base in nf4, with the adapter beside it.
UNMERGED = (*MERGE, *REFERENCE, "postprocess/weights/nf4_base_plus_adapter.py")

# The probabilities of one model, trained or packaged.
SCORES = (
    *MERGE,
    *PAIRS,
    *SCORING,
    *REFERENCE,
    "postprocess/agreement/model_scores.py",
    "postprocess/agreement/statistics.py",
    "postprocess/agreement/validation_rows.py",
)

AGREEMENT = (*SCORES, "postprocess/agreement")

PACKAGE = (
    *RUN,
    *PAIRS,
    "kaggle_kernels/runtime/models/fused.py",
    "kaggle_kernels/runtime/models/overflow.py",
    "kaggle_kernels/runtime/models/scoring.py",
    "kaggle_kernels/runtime/models/shortcuts.py",
    "postprocess/agreement/slices.py",
    "postprocess/agreement/statistics.py",
    "postprocess/agreement/validation_rows.py",
    "postprocess/package.py",
    "postprocess/report/calibration.py",
    "postprocess/report/metrics.py",
    "postprocess/report/predictions.py",
    "postprocess/temperature.py",
)

# The mean of several adapters, and a base model that nobody trained: runs that are not trained.
AVERAGE = (*SCORES, "postprocess/weights/average_lora.py")

ZERO_SHOT = (
    *SCORES,
    "postprocess/zero_shot",
    "recipes/pairwise/config/templates.py",
    "recipes/pairwise/contract.py",
)
