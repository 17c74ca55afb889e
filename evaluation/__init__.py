"""What serves the eval scripts: the encoder's file, training on labels, metrics, tables, pictures."""
