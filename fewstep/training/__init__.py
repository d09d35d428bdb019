"""The trainer and what it keeps: optimisers, data position, checkpoints, logs."""
