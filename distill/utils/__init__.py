"""What every folder may use: files, errors, processes; nothing of distillation."""
