"""`make bench-train`: how fast this project trains a reward model, beside TRL and transformers' Trainer."""
