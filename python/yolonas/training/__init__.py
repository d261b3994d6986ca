"""Training: assignment, loss, recipe and the loop itself."""
