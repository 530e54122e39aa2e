"""What happens to the weights after pruning."""
