"""What supervisor and agent share: the channel between them, and the settings. Kept light for PID 1."""
