"""The training: losses and trainers, a model's weights before the first step, checkpoints, and what CPUs and ZeRO-3 need."""
