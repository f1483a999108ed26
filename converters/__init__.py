"""Roads from a student to a deployable file, one file per edge, named `<Target>From<Source>`."""
