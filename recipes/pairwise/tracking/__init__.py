"""What a run leaves about itself: metrics and predictions of its validation rows, the recipe as it ran, and the wandb run."""
