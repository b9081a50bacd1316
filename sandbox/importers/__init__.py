"""Tasks that other projects publish, made into task directories: one module a format."""
