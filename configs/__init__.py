"""The lowest room: errors, paths, files and typed run configs. Imports nothing of the project."""
