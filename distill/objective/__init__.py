"""What a student is trained for: terms, their temperature, and which samples they see."""
