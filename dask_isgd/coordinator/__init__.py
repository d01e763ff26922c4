"""The long task that keeps the scorers busy with the chunks that matter."""
