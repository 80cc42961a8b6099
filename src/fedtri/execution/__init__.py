"""Executors: they train and score clients, each with its own adapter on one frozen model."""
