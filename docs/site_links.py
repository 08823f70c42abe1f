"""MkDocs hook: links from the pages to files of the repository work on the site as they do on GitHub.

A page links to `../notus/losses.py` or `../configs/demo`, which lie outside the site. With `repo_url` such a link leads
to the repository. Without it only the link's text is left, because there is nothing to lead to.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
# A link whose target lies outside docs/, or is a script in it. An image's target never does.
LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<target>(?:\.\./|make_|site_)[^()\s#]*)(?P<anchor>#[^()\s]*)?\)")


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Return the page with its links to the repository's files replaced; MkDocs calls this for every page."""
    return replace_links(markdown, page.file.src_uri, config.repo_url or "")


def replace_links(markdown: str, source: str, repository: str) -> str:
    """Return `markdown` with the links to files outside the site replaced.

    Args:
        markdown: the text of a page of docs/.
        source: the page's path within docs/, for messages.
        repository: its address, such as `https://github.com/OWNER/NAME`; "" if it has none.

    Raises:
        ValueError: a link's target does not exist.
    """

    def replaced(link: re.Match[str]) -> str:
        target = (DOCS / source).parent / link["target"]
        if not target.exists():
            raise ValueError(f"docs/{source} links to {link['target']}, which does not exist: correct the link")
        if not repository:
            return link["text"]
        kind = "tree" if target.is_dir() else "blob"
        path = target.resolve().relative_to(DOCS.parent).as_posix()
        address = repository.removesuffix("/").removesuffix(".git")
        return f"[{link['text']}]({address}/{kind}/main/{path}{link['anchor'] or ''})"

    return LINK.sub(replaced, markdown)
