"""Executors train and score clients: the reference defines what that means, the fast one must agree."""
