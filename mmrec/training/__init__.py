"""What the training programs share: run folders, checkpoints, schedules, progress."""
