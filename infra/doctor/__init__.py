"""What a deployment looks like from inside: every part is tried by a real call, and what fails says what to do."""
