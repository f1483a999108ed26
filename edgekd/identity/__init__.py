"""What makes two inputs of a stage the same: keys, and the state and source of callables."""
