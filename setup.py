"""
What setup.cfg cannot say: with REPOSITORY=https://github.com/OWNER/NAME in the environment, the package's page on an
index links to the repository, and shows README's pictures from there.
"""

import os
import re
from pathlib import Path

from setuptools import setup


def described(repository: str) -> dict:
    """Metadata of a package that is published from `repository`."""

    def absolute(link: re.Match) -> str:
        return (
            f"{link['image']}{link['text']}({repository}/{'raw' if link['image'] else 'blob'}/HEAD/{link['target']})"
        )

    links = re.compile(r"(?P<image>!?)(?P<text>\[[^\]]*\])\((?!https?://|#)(?P<target>[^)\s]+)\)")
    return {
        "long_description": links.sub(absolute, Path("README.md").read_text(encoding="utf-8")),
        "project_urls": {
            "Source": repository,
            "Documentation": f"{repository}/tree/HEAD/docs",
            "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
            "Issues": f"{repository}/issues",
            "Paper": "https://arxiv.org/abs/2106.15282",
        },
    }


repository = os.environ.get("REPOSITORY", "").rstrip("/")
setup(**(described(repository) if repository else {}))
