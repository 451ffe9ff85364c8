"""What people look at: tables, progress bars, the history of a training run, profiles."""
