"""What every mode uses and no idea changes: files, measures, optimizer, pictures, the machine. Knows `config` alone."""
