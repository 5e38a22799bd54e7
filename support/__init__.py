"""What every mode uses and no idea changes: checkpoints, files, pictures, devices, processes. Knows `config` alone."""
