"""What becomes of a student: files for other runtimes, predictions, the Hub."""
