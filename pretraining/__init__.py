"""What serves train_moco.py alone: schedule, bad steps, journal, checkpoint, collapse monitor."""
