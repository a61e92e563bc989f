"""The losses of all heads: cross-entropy on votes, and distillation from teachers, in float32."""

import torch

from recipes.pairwise.training.regularisers import focal_factors


def soft_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> torch.Tensor:
    """Return the cross-entropy against probabilities, its weighted mean over pairs and orders.

    Args:
        logits: Of shape (pairs, orders, verdicts).
        labels: Target probabilities, of the same shape. A pair without votes has zeros, and no loss.
        weight: Of shape (pairs,); 1 on average over all rows, not over a batch: it counts in a
            micro-batch of one pair too.
        label_smoothing: The share of the uniform distribution that is mixed into the labels, as in
            Szegedy et al. 2016.
        focal_gamma: See regularisers.focal_factors.
    """
    # The labels of a pair sum to 1 with votes and to 0 without: only the former are smoothed.
    verdicts = labels.shape[-1]
    has_votes = labels.sum(dim=-1, keepdim=True)
    uniform = has_votes / verdicts
    targets = (1 - label_smoothing) * labels + label_smoothing * uniform

    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    losses_pov = -targets * log_probabilities
    if focal_gamma > 0:
        losses_pov = losses_pov * focal_factors(log_probabilities, focal_gamma)

    losses_po = losses_pov.sum(dim=-1)
    losses_p = losses_po.mean(dim=1) * weight
    return losses_p.mean()


def distillation_loss(
    logits: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the divergence of the student from its teachers at a temperature (Hinton et al. 2015), in float32.

    It is T^2 times the Kullback-Leibler divergence of the softened distributions: T^2 keeps the
    gradient's size when T changes. The softened teacher is softmax(log p / T), which is softmax(z / T)
    of the logits z that p came from.

    Args:
        logits: Of shape (pairs, orders, verdicts).
        teacher: The teachers' probabilities, of the same shape.
        weight: Of shape (pairs,), see soft_cross_entropy.
        temperature: Above 1, both distributions are softer.
    """
    # The logarithm of a probability of 0 would be minus infinity.
    smallest = torch.finfo(torch.float32).tiny
    teacher_logits = torch.log(teacher.float().clamp(min=smallest))
    teacher_log_p = torch.log_softmax(teacher_logits / temperature, dim=-1)
    student_log_p = torch.log_softmax(logits.float() / temperature, dim=-1)

    divergence_pov = teacher_log_p.exp() * (teacher_log_p - student_log_p)
    divergence_po = divergence_pov.sum(dim=-1)
    losses_p = temperature**2 * divergence_po.mean(dim=1) * weight
    return losses_p.mean()
