"""Model types that train here and cannot be served on Kaggle's T4s, with the reason. `postprocess` and `build` refuse them.

Training only warns: a teacher of such a type labels pairs here, and is never served.
"""

KAGGLE_TRANSFORMERS = "5.0.0"

# What transformers 5.16.1 has a class for and 5.0.0 has not, by the classes that a head needs.
# fmt: off
NOT_ON_KAGGLE = {
    "classifier": (
        "axk1", "axk2", "cohere_compass_text", "esmc", "eurobert", "jina_embeddings_v3",
        "minicpm3", "mistral4", "modernvbert", "nomic_bert", "olmo", "olmo2", "olmo3",
        "qwen3_5", "qwen3_5_text",
    ),
    "causal LM": (
        "axk1", "axk2", "cohere2_moe", "cohere_compass_text", "deepseek_v32", "deepseek_v4",
        "exaone_moe", "gemma4", "gemma4_assistant", "gemma4_text", "gemma4_unified",
        "gemma4_unified_assistant", "gemma4_unified_text", "glm_moe_dsa", "granite_swa",
        "granitemoe_swa", "hrm_text", "hy_v3", "hyperclovax", "inkling_text", "laguna",
        "mellum", "mimo_v2_flash", "minicpm3", "minimax_m3_vl_text", "nemotron_h",
        "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
        "qwen4_exp", "qwen4_exp_text", "youtu", "zaya",
    ),
}
# fmt: on

# Their activations exceed float16, and a T4 has no bfloat16.
OVERFLOWING = ("gemma3", "gemma3_text")
OVERFLOW_SOURCE = "https://github.com/huggingface/transformers/issues/36822"


def why_not_served(model_type: str, head: str) -> str | None:
    """Say why a model of this type cannot be served with a head; None where it can."""
    if model_type in OVERFLOWING:
        return f"activations of {model_type} overflow float16, and a T4 has no bfloat16 ({OVERFLOW_SOURCE})"

    model_class = "causal LM" if head == "label_tokens" else "classifier"
    if model_type in NOT_ON_KAGGLE[model_class]:
        return f"Kaggle's transformers {KAGGLE_TRANSFORMERS} has no {model_class} for {model_type}"
    return None
