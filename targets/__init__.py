"""How a device is reached (`transports`), what runs there (`runtimes`), and the program that runs on it (`runner`)."""
