"""What a slice, a mask, a volume and a set are on disk, and how they are drawn."""
