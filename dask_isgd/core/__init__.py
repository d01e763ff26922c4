"""What a run is made of: its specification, model, loss and minibatches."""
