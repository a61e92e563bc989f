"""What many tests of recipes begin with: a `pairwise:` block, its contract, and rows of a dataset."""

from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.contract import new_contract

TWO = ("model_a", "model_b")
ROWS = [
    {"id": "x", "sequences": [[5, 6, 7], [5, 7, 6, 8]], "labels": [0.75, 0.25], "weight": 2.0},
    {"id": "y", "sequences": [[9], [8]], "labels": [0.0, 1.0], "weight": 1.0},
]


def block_of(**keys) -> PairwiseBlock:
    """A block of the keys that it cannot do without, and others."""
    return PairwiseBlock(**{"template": "gemma", "budget_tokens": 256, "package": {"slug": "some-model"}} | keys)


def contract_of(tokenizer, **keys):
    """The contract of such a block."""
    return new_contract(block_of(**keys), tokenizer, attention="sdpa", base_model="m", revision=None, pad_token_id=0)
