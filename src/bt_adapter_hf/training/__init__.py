"""Training with `transformers.Trainer`: arguments and trainer for pretraining the branch."""
