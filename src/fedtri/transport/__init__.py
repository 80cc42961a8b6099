"""Ways to carry tasks to clients and replies back."""
