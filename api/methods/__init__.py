"""What can be trained: methods, objectives and what goes with what."""
