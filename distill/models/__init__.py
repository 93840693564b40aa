"""Teachers, students, and students on disk."""
