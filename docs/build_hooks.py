"""MkDocs hooks: pages that live outside `docs/`, where GitHub and pip look for them.

README.md is the home page of the site, CHANGELOG.md, CONTRIBUTING.md and docker/README.md are pages. Each
exists once; links to and from them are written for the repository and rewritten here for the site. A page
that would load anything from another host stops the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docker/README.md": "docker.md",
}
"""Path in the repository to path in the site."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
LOADS = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\s(?:src|href)=[\"']?(?:https?:)?//[^\"'\s>]+"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside."""
    root = Path(config.config_file_path).parent
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite the links of a page that leave `docs/`, or that start outside."""
    in_site = page.file.src_uri
    in_repository = next(
        (source for source, target in OUTSIDE.items() if target == in_site), f"docs/{in_site}"
    )

    def rewritten(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), link[1]))
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(in_site) or ".")

    return LINK.sub(rewritten, markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse a page that a reader without a network would not see whole."""
    if foreign := LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {foreign[0]}")
    return output
