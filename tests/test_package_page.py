"""The metadata that an index makes a package's page of."""

import email
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
BUILD = "from setuptools.build_meta import prepare_metadata_for_build_wheel as build; build('built')"
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture
def metadata(tmp_path):
    """Of the package, as built with these environment variables."""
    source = tmp_path / "source"
    (source / "cdm_diffusers").mkdir(parents=True)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "cdm_diffusers/__init__.py"):
        shutil.copy(ROOT / name, source / name)
    (source / "built").mkdir()

    def build(**variables: str) -> email.message.Message:
        environment = {name: value for name, value in os.environ.items() if name != "CDM_REPOSITORY"} | variables
        subprocess.run([sys.executable, "-c", BUILD], cwd=source, env=environment, check=True, capture_output=True)
        (file,) = source.glob("built/*.dist-info/METADATA")
        return email.message_from_string(file.read_text(encoding="utf-8"))

    return build


def test_links_and_pictures_are_found_from_an_index(metadata):
    """Each stands for the same file as in the repository, whose address has a slash at its end or not."""
    repository = "https://example.com/someone/cdm"
    built = metadata(CDM_REPOSITORY=f"{repository}/")
    ours = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    theirs = LINK.findall(built.get_payload())
    assert len(ours) == len(theirs) > 30 and any(image for image, _ in ours)
    for (image, target), (_, absolute) in zip(ours, theirs, strict=True):
        if target.startswith("https://"):
            assert absolute == target
        else:
            assert absolute == f"{repository}/{'raw' if image else 'blob'}/HEAD/{target}"
            assert (ROOT / target.partition("#")[0]).is_file()
    urls = dict(entry.split(", ") for entry in built.get_all("Project-URL"))
    assert urls.keys() == {"Source", "Documentation", "Changelog", "Issues", "Paper", "Diffusers"}
    assert urls["Source"] == repository and urls["Issues"] == f"{repository}/issues"
    assert not re.search(r"\]\((?!https?://|#)|<img", built.get_payload())


def test_a_package_of_no_repository_says_nothing_of_one(metadata):
    built = metadata()
    assert built.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert {entry.split(", ")[0] for entry in built.get_all("Project-URL")} == {"Paper", "Diffusers"}
