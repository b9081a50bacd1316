"""Tasks on real code, the sandboxes they run in, and the verdict on a repair. Knows no JAX."""
