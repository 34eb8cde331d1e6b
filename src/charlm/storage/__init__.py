"""What stands on the disk: runs, logs, model and state files."""
