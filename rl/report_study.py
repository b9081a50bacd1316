from pathlib import Path


def write_study(folder: Path) -> Path:
    return folder / "report.html"
