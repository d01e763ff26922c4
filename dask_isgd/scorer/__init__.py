"""The short tasks that compute norms and evaluate the model."""
