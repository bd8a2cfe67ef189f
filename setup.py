"""
What setup.cfg cannot say: with CDM_REPOSITORY=https://github.com/OWNER/NAME in the environment, the package's page on
an index links to the repository, and shows README's pictures from there.
"""

import os
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup


def described(repository: str) -> dict:
    """Metadata of a package that is published from `repository`."""

    def absolute(link: re.Match) -> str:
        return (
            f"{link['image']}{link['text']}({repository}/{'raw' if link['image'] else 'blob'}/HEAD/{link['target']})"
        )

    declared = ConfigParser(interpolation=None)
    declared.read("setup.cfg")
    links = re.compile(r"(?P<image>!?)(?P<text>\[[^\]]*\])\((?!https?://|#)(?P<target>[^)\s]+)\)")
    return {
        "long_description": links.sub(absolute, Path("README.md").read_text(encoding="utf-8")),
        "project_urls": {
            "Source": repository,
            "Documentation": f"{repository}/tree/HEAD/docs",
            "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
            "Issues": f"{repository}/issues",
            **dict(line.split(" = ") for line in declared["metadata"]["project_urls"].strip().splitlines()),
        },
    }


repository = os.environ.get("CDM_REPOSITORY", "").rstrip("/")
if repository and not repository.startswith("https://"):
    raise SystemExit(f"`CDM_REPOSITORY` is {repository!r}; it must begin with https://.")
setup(**(described(repository) if repository else {}))
