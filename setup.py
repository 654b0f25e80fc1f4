"""What pyproject.toml cannot say: PyPI shows README.md without the files beside it, so its links are made absolute."""

import os
import re
from pathlib import Path

from setuptools import setup

# Where files of this repository can be read, such as https://HOST/OWNER/NAME/blob/main; without it links stay relative.
REPOSITORY = os.environ.get("REPOSITORY", "")


def absolute_links(text: str, repository: str) -> str:
    """Make relative links and images of a Markdown text absolute; `repository` has no final slash."""
    image = re.compile(r"(!\[[^]]*\]\()(?!https?:|#)([^)]+)\)")
    link = re.compile(r"(\]\()(?!https?:|#)([^)]+)\)")
    return link.sub(rf"\g<1>{repository}/\g<2>)", image.sub(rf"\g<1>{repository}/\g<2>?raw=true)", text))


if __name__ == "__main__":
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute_links(readme, REPOSITORY) if REPOSITORY else readme,
        long_description_content_type="text/markdown",
        project_urls={"Source": REPOSITORY, "Changelog": f"{REPOSITORY}/CHANGELOG.md"} if REPOSITORY else {},
    )
