"""What every project needs and nobody comes here to read: files, devices, ranks, checkpoints, data on disk."""
