"""Fetching pinned releases: from a real index in a folder, with every way it can go wrong."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import InputError
from sandbox.package_index import pip_settings
from sandbox.packages import Package, Release, adopt, fetch, load_packages
from sandbox.unpack import MTIME, unpack_sdist
from tests.sandbox.releases import sdist

FILES = {
    "src/mini/__init__.py": "def double(x):\n    return 2 * x\n",
    "tests/test_mini.py": "from mini import double\n\ndef test_it():\n    assert double(2) == 4\n",
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is a package index with `mini` 1.0 and, withdrawn, 2.0; the only one there."""
    home = tmp_path / "index"
    page = home / "mini" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(
        '<a href="mini-1.0.tar.gz">mini-1.0.tar.gz</a>'
        '<a href="mini-2.0.tar.gz" data-yanked="broken">mini-2.0.tar.gz</a>'
        '<a href="mini-1.0-py3-none-any.whl">mini-1.0-py3-none-any.whl</a>'
    )
    (page.parent / "mini-1.0.tar.gz").write_bytes(sdist(FILES))
    use_index(monkeypatch, home.as_uri())
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    return home


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", url)
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)


def release(version: str = "1.0", sha256: str | None = None, name: str = "mini") -> Release:
    return Release(name, version, sha256 or hashlib.sha256(sdist(FILES)).hexdigest())


def test_a_release_is_fetched_once_and_then_needs_no_index(index: Path) -> None:
    seen: list[Release] = []
    fetch([release()], seen.append)
    tree = release().tree
    assert (tree / "src/mini/__init__.py").read_text() == FILES["src/mini/__init__.py"]
    assert all(path.stat().st_mtime == MTIME for path in tree.rglob("*.py"))
    shutil.rmtree(index)
    fetch([release(), release()], seen.append)
    assert seen == [release(), release()]
    shutil.rmtree(tree)  # unpacked again from the cached archive
    fetch([release()])
    assert tree.is_dir()


@pytest.mark.parametrize("was_there", [False, True])
def test_a_package_of_our_index_is_compiled_with_its_tests(index: Path, was_there: bool) -> None:
    if was_there:  # as the older of two releases, to be read only
        fetch([release()])
    package = Package(
        "mini", "1.0", release().sha256, "MIT", "train", ("src/mini",), ("tests",), ("src",)
    )
    fetch([package])
    compiled = {path.name.partition(".")[0] for path in package.tree.rglob("*.pyc")}
    assert compiled == {"__init__", "test_mini"}
    assert any("pytest" in path.name for path in (package.tree / "tests").rglob("*.pyc"))


def test_a_wrong_hash_is_refused_and_not_kept(index: Path) -> None:
    wanted = "0" * 64
    with pytest.raises(InputError) as error:
        fetch([release(sha256=wanted)])
    for part in ("mini 1.0", wanted, release().sha256):
        assert part in str(error.value)
    assert not release(sha256=wanted).archive.exists()
    assert not release(sha256=wanted).tree.exists()
    assert not list(release().archive.parent.iterdir())


def test_a_tampered_cached_archive_is_never_used(index: Path) -> None:
    release().archive.parent.mkdir(parents=True)
    release().archive.write_bytes(sdist({"src/mini/__init__.py": "evil = True\n"}))
    fetch([release()])
    assert "evil" not in (release().tree / "src/mini/__init__.py").read_text()
    shutil.rmtree(release().tree)
    shutil.rmtree(index)
    release().archive.write_bytes(b"tampered")
    with pytest.raises(InputError, match="mini 1.0"):
        fetch([release()])
    assert not release().tree.exists()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (release("9.9", "0" * 64), "no sdist .* mini 9.9"),
        (release("2.0", "0" * 64), "withdrawn.*broken"),
        (release(name="nothing-here", sha256="0" * 64), "no sdist .* nothing-here"),
    ],
)
def test_what_the_index_lacks_is_said_in_one_error(
    index: Path, wanted: Release, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fetch([wanted])


def test_no_network_is_said(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, "http://127.0.0.1:9/simple")
    with pytest.raises(InputError, match="could not reach the package index for mini 1.0"):
        fetch([release()])


def test_a_local_copy_is_used_only_if_it_is_the_pinned_one(index: Path, tmp_path: Path) -> None:
    shutil.rmtree(index)
    copy = tmp_path / "copy.tar.gz"
    copy.write_bytes(b"something else")
    with pytest.raises(InputError, match="is pinned for mini 1.0"):
        adopt(release(), copy)
    copy.write_bytes(sdist(FILES))
    adopt(release(), copy)
    assert (release().tree / "tests/test_mini.py").is_file()


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ('<a href="dep-1-py3-none-any.whl" data-yanked="bad">dep-1-py3-none-any.whl</a>', "bad"),
        ('<a href="dep-2-py3-none-any.whl">dep-2-py3-none-any.whl</a>', "no such wheel of dep 1"),
        ('<a href="dep-1-py3-none-any.whl">dep-1-py3-none-any.whl</a>', "is pinned"),
    ],
    ids=["yanked", "missing", "another file"],
)
def test_a_wheel_that_tests_need_is_had_as_pinned_or_not_at_all(
    index: Path, page: str, message: str
) -> None:
    (index / "dep").mkdir()
    (index / "dep/index.html").write_text(page)
    (index / "dep/dep-1-py3-none-any.whl").write_bytes(b"another file")
    needs = Release(
        "mini",
        "1.0",
        hashlib.sha256(sdist(FILES)).hexdigest(),
        requirements=(f"dep==1 --hash=sha256:{'0' * 64}",),
    )
    with pytest.raises(InputError, match=message):
        fetch([needs])
    assert not needs.tree.exists()


def test_a_release_that_a_task_carries_is_asked_of_no_index(index: Path) -> None:
    with pytest.raises(InputError, match="mini 1.0 is on no index"):
        fetch([replace(release(), carried=True)])


def unsafe_archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("mini-1.0/a.py")
        if kind == "dotdot":
            member.name = "mini-1.0/../../evil.py"
        elif kind == "absolute":
            member.name = "/tmp/evil.py"
        elif kind == "two tops":
            tar.addfile(tarfile.TarInfo("other/b.py"))
        elif kind == "fifo":
            member.type = tarfile.FIFOTYPE
        else:
            member.type = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE
            member.linkname = "/etc/passwd"
        tar.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["dotdot", "absolute", "two tops", "fifo", "symlink", "hardlink"])
def test_unsafe_archives_are_refused_whole(tmp_path: Path, kind: str) -> None:
    archive, target = tmp_path / "mini-1.0.tar.gz", tmp_path / "trees" / "mini"
    archive.write_bytes(unsafe_archive(kind))
    with pytest.raises(InputError, match="mini-1.0.tar.gz"):
        unpack_sdist(archive, target)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mini-1.0.tar.gz", "trees"]


@pytest.mark.parametrize("length", [0, 40, 150])
def test_a_damaged_archive_is_refused_whole(tmp_path: Path, length: int) -> None:
    archive, target = tmp_path / "mini-1.0.tar.gz", tmp_path / "trees" / "mini"
    archive.write_bytes(sdist(FILES)[:length])
    with pytest.raises(InputError, match="not a readable sdist"):
        unpack_sdist(archive, target)
    assert not target.exists() and not list(target.parent.iterdir())


def test_settings_are_pips_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://files.example/simple\ntimeout = 7\n"
        f"extra-index-url = https://more.example/simple\n  {(tmp_path / 'absent').as_uri()}\n"
        f"find-links = {tmp_path}\ntrusted-host = files.example\n"
    )
    use_index(monkeypatch, "https://variable.example/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.delenv("PIP_DEFAULT_TIMEOUT", raising=False)
    settings = pip_settings()
    assert settings.index_urls[:2] == (
        "https://variable.example/simple",
        "https://more.example/simple",
    )
    assert not any("absent" in url for url in settings.index_urls)
    assert str(tmp_path) in settings.find_links
    assert "files.example" in settings.trusted_hosts


def test_the_shipped_packages_are_whole_and_split() -> None:
    packages = load_packages()
    assert len(packages) >= 16
    assert {package.split for package in packages.values()} == {"train", "heldout"}
    for package in packages.values():
        assert len(package.sha256) == 64 and package.licence and package.source and package.tests


def test_a_damaged_package_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packages.toml"
    path.write_text('[mini]\nversion = "1.0"\ncolour = "red"\n')
    with pytest.raises(InputError, match="package mini"):
        load_packages(path)
    path.write_text("[mini")
    with pytest.raises(InputError, match="cannot read"):
        load_packages(path)


@pytest.mark.network
def test_a_real_release_comes_from_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path))
    package = load_packages()["inflection"]
    try:
        fetch([package])
    except InputError as error:
        if "could not reach" in str(error):
            pytest.skip(str(error))
        raise
    assert (package.tree / "inflection" / "__init__.py").is_file()
