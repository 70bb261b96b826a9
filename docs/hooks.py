"""Lets pages link to files of the repository that lie outside docs/, and puts some of those on the site as pages.

README.md is the site's home page. A file that a page links to is copied to the same path on the site, so that links
work in the repository and on the site alike. The API reference is of the installed package, because in a checkout
memedge.engine and memedge.export do not lie in memedge/.
"""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import ConfigurationError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files of the repository -> pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "bench/tiny/README.md": "bench/tiny/README.md",
    "memedge/data/ATTRIBUTION.md": "memedge/data/ATTRIBUTION.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")


@event_priority(100)  # before mkdocstrings reads it
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Tell mkdocstrings where the package is installed."""
    installed = next((path for path in sys.path if (Path(path) / "memedge/engine/__init__.py").is_file()), None)
    if installed is None:
        raise ConfigurationError("memedge is not installed: run `python -m pip install '.[docs]'`.")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [installed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and all that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for file in list(files.documentation_pages()):
        source = _source(file)
        for target in LINK.findall(file.content_string):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            if files.get_file_from_path(_on_site(path)) is None and (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Let links lead where their targets are on the site."""
    source, here = _source(page.file), posixpath.dirname(page.file.src_uri)

    def move(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        return posixpath.relpath(_on_site(path), here or ".")

    return LINK.sub(move, markdown)


def _source(file: File) -> str:
    """Return where a page is in the repository."""
    return SOURCES.get(file.src_uri, f"docs/{file.src_uri}")


def _on_site(path: str) -> str:
    """Return where a file of the repository is on the site."""
    return PAGES.get(path, path.removeprefix("docs/"))
