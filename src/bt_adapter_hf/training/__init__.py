"""Training with `transformers.Trainer`: pretraining of the branch, and instruction tuning of the chat models."""
