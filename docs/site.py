"""What the site does beside building Markdown: the pages are written for a Git host, where ``../src`` leads somewhere.

- CHANGELOG.md and CONTRIBUTING.md, in the root of the repository, are pages too.
- Figures that lie outside of docs/ are copied into the site.
- Roles of Sphinx in docstrings (``:class:`~a.b` ``) become code, and names of pages (docs/serving.md) links.
- Other links out of docs/ lead to the repository, if mkdocs.yml names one (``repo_url``). Otherwise they become the
  path of the file, as code.
"""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
FIGURES = "benchmarks/results"
LINK = re.compile(r"(?P<image>!?)\[(?P<label>(?:[^\]\\]|\\.)*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|mod|data):<code>(?:~[\w.]*\.)?([\w.]+)</code>")
PAGE = re.compile(r"\bdocs/(\w+)\.md\b")
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def resolve(text: str, page: str, repository: str | None) -> str:
    """The page's Markdown with every link out of docs/ turned into one that the site has.

    ``page``: its path in the repository. ``repository``: the address under which files stand by their paths, or None.
    """
    where = {f"docs/{name}": name for name in PAGES.values()} | dict(PAGES)
    # Links stay untouched inside of code.
    code = [(m.start(), m.end()) for m in CODE.finditer(text) if "](" in m[0]]

    def replace(match: re.Match[str]) -> str:
        if any(start <= match.start() < end for start, end in code):
            return match[0]
        image, label, target = match["image"], match["label"], match["target"]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        here = posixpath.dirname(place(page))
        if (
            (path.startswith("docs/") and not path.endswith(".py"))
            or path in where
            or (image and path.startswith(FIGURES))
        ):
            inside = where.get(path) or path.removeprefix("docs/")
            return f"{image}[{label}]({posixpath.relpath(inside, here or '.')}{match['anchor'] or ''})"
        if repository:
            return f"{image}[{label}]({repository}/{path})"
        plain = label.replace("\\", "").strip("`")
        if path.endswith(plain):
            return f'`{plain}`{{ title="{path}" }}'
        return f"{label} (`{path}`)"

    return LINK.sub(replace, text)


def place(page: str) -> str:
    """Where a file of the repository stands in the site's sources."""
    return PAGES.get(page) or page.removeprefix("docs/")


def source(page: str) -> str:
    """The file of the repository that a page of the site comes from."""
    return next((path for path, name in PAGES.items() if name == page), f"docs/{page}")


def figures() -> Mapping[str, Path]:
    """The figures outside of docs/, by their path in the site."""
    return {str(file.relative_to(ROOT)): file for file in sorted((ROOT / FIGURES).glob("*.png"))}


def of_docstrings(html: str, up: str) -> str:
    """A page of the reference, with names in place of Sphinx's roles and links in place of names of pages.

    ``up``: the way from the page to the root of the site.
    """
    return PAGE.sub(rf'<a href="{up}\1/">docs/\1.md</a>', ROLE.sub(r"<code>\1</code>", html))


def on_files(files, config):
    """Add the pages and figures that lie outside of docs/."""
    from mkdocs.structure.files import File

    outside = figures() | {name: ROOT / path for path, name in PAGES.items()}
    for name, file in outside.items():
        files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown, page, config, files):  # noqa: ARG001
    """Turn the links of a page."""
    repository = f"{config.repo_url.rstrip('/')}/blob/main" if config.repo_url else None
    return resolve(markdown, source(page.file.src_uri), repository)


def on_page_content(html, page, config, files):  # noqa: ARG001
    """Finish what docstrings have become."""
    return of_docstrings(html, "../" * page.url.count("/")) if page.url.startswith("reference/") else html
