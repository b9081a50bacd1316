"""Have releases in the cache, with progress."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.packages import Release, fetch
from tools.progress import progress


def fetch_all(releases: Sequence[Release]) -> None:
    """Fetch what is not there yet; raises InputError as `sandbox.packages.fetch` does."""
    with progress("packages") as report:
        done = 0

        def one(release: object) -> None:
            nonlocal done
            done += 1
            report(done, len(releases), "")

        fetch(releases, one)
