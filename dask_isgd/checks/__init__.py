"""What is checked before a run starts, and what is watched while it runs."""
