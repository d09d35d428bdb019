"""What a distillation would take, found by running it on tensors that have shapes and no numbers."""
