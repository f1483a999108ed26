"""Programs that run in environments of their own, with the standard library and that environment's packages; nothing imports them."""
