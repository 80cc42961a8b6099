"""What an adapted layer computes, the keys and shapes of its tensors, and what they start from."""
