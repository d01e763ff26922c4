"""The long task that trains: it draws, steps, publishes, commits checkpoints and reports."""
