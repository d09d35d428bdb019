"""One paper per file: what each distillation method asks of generator and critic."""
