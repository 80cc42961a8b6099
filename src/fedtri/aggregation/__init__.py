"""Algebra that methods share: weighted means, factored products, server optimisers, distance to the exact mean."""
