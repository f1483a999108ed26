"""Device profiles: TOML files, data only. The grammar is in the README beside them."""
