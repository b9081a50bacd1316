"""What runs under a peer's own interpreter: one script a peer, and pins for its environment.

`worker.py` says what a script must do. Scripts are run by path, never imported as a package.
"""
