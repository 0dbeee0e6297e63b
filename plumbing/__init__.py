"""What every project needs and nobody comes to read: devices, ranks, files, data on disk, checkpoints."""
