"""Micro-batches under a token budget: which rows each process computes, at each turn of each step.

The plugin plans them before a model is loaded, and Axolotl's trainer reads them as a batch sampler.

A step holds a fixed number of pairs, which its processes compute in a fixed number of turns. The rows
of an epoch are sorted by length and cut into one band for each turn of a step. A step takes a random
micro-batch from each band for each process. So all steps have the same mix of long and short rows,
and at each turn all processes hold rows of about the same length.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import BatchSampler

from preprocess.core.errors import UserError
from recipes.pairwise.data.collators import PADDED_TO_MULTIPLE_OF


@dataclass(frozen=True)
class StepShape:
    """What one optimizer step holds."""

    mean_pairs: int  # of a micro-batch: the recipe's micro_batch_size
    turns: int  # micro-batches of each process: the recipe's gradient_accumulation_steps
    processes: int  # that train together, one for each GPU
    sequences_per_pair: int  # 2 with both orders and for the reward head, otherwise 1

    @property
    def pairs_of_process(self) -> int:
        return self.mean_pairs * self.turns

    @property
    def pairs(self) -> int:
        return self.pairs_of_process * self.processes


class TokenBudgetBatches(BatchSampler):
    """The micro-batches of all processes in turn, as accelerate deals them out: one to each process.

    Every row is read once in an epoch. The last step is filled up with rows that are drawn again. The order
    follows from the seed and `epoch`, which BeginEpoch sets.
    """

    # accelerate reads both: None tells it that micro-batches differ in size.
    batch_size = None
    drop_last = False

    def __init__(self, lengths: np.ndarray, shape: StepShape, budget: int, seed: int):
        """Plan the micro-batches.

        Args:
            lengths: Tokens that each sequence of a pair takes in a batch, of shape (rows,). With padding
                that is the longer one's length for both, without padding the mean of the two.
            shape: What a step holds.
            budget: The most tokens of a micro-batch, padding included.
            seed: The run's.

        Raises:
            UserError: If the longest rows do not fit into the budget.
        """
        # The tokens of each row with its padding: a row of 13 tokens is padded to 16.
        units_r = np.ceil(lengths / PADDED_TO_MULTIPLE_OF).astype(int)
        self.widths_r = units_r * PADDED_TO_MULTIPLE_OF
        self.shape = shape
        self.seed = seed
        self.epoch = 0

        # All steps hold the same number of pairs. What the last one lacks is filled up with rows that
        # are drawn again: of 10 rows in steps of 4, it lacks 2.
        self.steps = math.ceil(len(lengths) / shape.pairs)
        self.refill_count = self.steps * shape.pairs - len(lengths)

        self.most_tokens = self.count_tokens_of_worst_epoch()
        if self.most_tokens > budget:
            raise UserError(
                f"pairwise.tokens_per_micro_batch: {budget:,}, but {shape.pairs_of_process} pairs in "
                f"{shape.turns} micro-batches a step need up to {self.most_tokens:,} tokens in one; "
                "raise it, or lower micro_batch_size and raise gradient_accumulation_steps"
            )

    def __len__(self) -> int:
        return self.steps * self.shape.turns * self.shape.processes

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row numbers of each micro-batch of an epoch, by step, turn and process."""
        rng = np.random.default_rng([self.seed, self.epoch])
        bands = self.cut_into_bands(self.draw_rows(rng))
        # Which step gets which micro-batches of a band is random.
        shuffled_bands = [rng.permutation(band) for band in bands]

        for step in range(self.steps):
            for band in shuffled_bands:
                for micro_batch in band[step]:
                    yield micro_batch.tolist()

    def count_tokens_of_worst_epoch(self) -> int:
        """Count the tokens of the largest micro-batch that any epoch can have.

        That is the one that draws the longest rows again to fill up its last step. With rows of 32, 16, 16,
        16, 8 and 8 tokens and two rows to draw, it holds 32, 32, 16, 16, 16, 16, 8 and 8.
        """
        longest_first = np.sort(self.widths_r)[::-1]
        refill = longest_first[: self.refill_count]
        if self.refill_count > len(longest_first):
            # With so few rows draw_rows may draw a row more than once: at worst the longest, each time.
            refill = np.full(self.refill_count, longest_first[0])

        all_rows = np.concatenate([longest_first, refill])
        worst_epoch = np.sort(all_rows)[::-1]
        return find_least_budget(worst_epoch, self.shape)

    def draw_rows(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the rows of an epoch, the longest first, rows of one length in random order."""
        row_count = len(self.widths_r)
        # A refill draws no row twice, unless there are fewer rows than it needs.
        needs_repeats = self.refill_count > row_count
        refill = rng.choice(row_count, self.refill_count, replace=needs_repeats)
        shuffled_rows = rng.permutation(row_count)
        rows = np.concatenate([shuffled_rows, refill])

        # A stable sort keeps the random order of rows of one length.
        longest_first = np.argsort(-self.widths_r[rows], kind="stable")
        return rows[longest_first]

    def cut_into_bands(self, rows: np.ndarray) -> list[np.ndarray]:
        """Cut an epoch's row numbers, the longest row first, into one band for each turn of a step.

        Returns:
            For each turn the row numbers of its micro-batches, of shape (steps, processes, pairs).
            The number of pairs differs between turns: the longer the rows, the fewer. Rows 0 to 7 in
            two steps on one process, with 1 pair in the first turn and 3 in the second, become the bands
            [[[0]], [[1]]] and [[[2, 3, 4]], [[5, 6, 7]]].
        """
        # The smallest budget gives the turns of a step about the same number of tokens.
        widths_r = self.widths_r[rows]
        tokens = find_least_budget(widths_r, self.shape)
        pairs_by_turn = fill_turns(widths_r, self.shape, tokens)

        # The first band has the longest rows, the next one those that follow, and so on.
        bands = []
        first_row = 0
        for pairs in pairs_by_turn:
            band_shape = (self.steps, self.shape.processes, pairs)
            end_row = first_row + math.prod(band_shape)
            band = rows[first_row:end_row]
            bands.append(band.reshape(band_shape))
            first_row = end_row
        return bands


def find_least_budget(widths_r: np.ndarray, shape: StepShape) -> int:
    """Find the smallest budget of tokens under which the turns of a step hold all its pairs.

    A turn is one micro-batch of each process. In the example of fill_turns, the turns hold all 4 pairs
    of a step under a budget of 48 tokens, but only 3 of them under 47: the result is 48.
    """

    def count_pairs(tokens: int) -> int:
        return sum(fill_turns(widths_r, shape, tokens))

    # Tokens for all pairs of a process at the longest width hold all of them. A larger budget never holds
    # fewer pairs, so that bisection finds the smallest.
    enough = int(widths_r[0]) * shape.sequences_per_pair * shape.pairs_of_process
    return bisect.bisect_left(range(enough), shape.pairs_of_process, key=count_pairs)


def fill_turns(widths_r: np.ndarray, shape: StepShape, tokens: int) -> list[int]:
    """Divide a process's pairs of one step among its turns, under a budget of tokens.

    The first turn takes the longest rows of the epoch, as many pairs in each micro-batch as fit; the
    next turn takes the longest rows that are left, and so on. All steps are filled alike.

    Example: one process has 4 pairs a step in 2 turns, a pair is one sequence, and the budget is 48
    tokens. The epoch has 2 steps, so that each turn has 2 micro-batches, one for each step.

        widths of the rows   32 32 | 16 16 16 16 8 8
        turn                     0 |               1
        pairs that fit  48 // 32 = 1 | 48 // 16 = 3     result: [1, 3]

    Returns:
        The pairs of a micro-batch at each turn. Where the budget is too small, their sum is less
        than the pairs that a process has to compute in a step.
    """
    # A turn takes rows for one micro-batch of each process, in every step of the epoch.
    steps = len(widths_r) // shape.pairs
    micro_batches_of_turn = steps * shape.processes
    pairs_by_turn = []
    pairs_left = shape.pairs_of_process
    first_row = 0

    for turn in range(shape.turns):
        # All rows of a turn are padded to its longest one, which is its first.
        tokens_per_pair = int(widths_r[first_row]) * shape.sequences_per_pair
        pairs_that_fit = tokens // tokens_per_pair

        # Each of the later turns needs at least one pair.
        later_turns = shape.turns - turn - 1
        pairs = min(pairs_that_fit, pairs_left - later_turns)

        pairs_by_turn.append(pairs)
        pairs_left -= pairs
        first_row += pairs * micro_batches_of_turn
    return pairs_by_turn
