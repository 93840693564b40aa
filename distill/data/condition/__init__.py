"""What is done to data on purpose: wrong labels, long tails, corrupted pictures."""
