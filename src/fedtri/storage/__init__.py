"""What lies on disk: run directories, checkpoints and each client's own tensors."""
