"""Training a student from a teacher: losses, feature taps, cached teacher outputs, a trainer that resumes. Nothing here imports torch at once."""
