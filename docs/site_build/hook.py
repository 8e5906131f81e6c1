"""The site is the repository: its documents under their own paths, and generated pages.

Every document keeps its path in the repository, so that the links that work on disk work
on the site. Generated are notebooks, as they were run, and a page of the reference for
every public namespace, with all of its `__all__`.
"""

import ast
import base64
import fnmatch
import html
import json
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "trainax_pk"
DOCUMENTS = [
    "README.md",
    "LICENSE",
    "docs/*.md",
    "docs/pictures/*",
    "docs/site_build/*.css",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "notebooks/*.ipynb",  # for download
]


@event_priority(100)  # before the plugins
def on_files(files, config):
    """Puts the site's files together and fills the globs of the navigation."""
    docs = Path(config.docs_dir)
    found = Files([f for f in files if f.src_dir is None or Path(f.src_dir) != docs])
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            found.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        for uri, content in notebook(path).items():
            found.append(File.generated(config, uri, content=content))
    for uri, content in reference().items():
        found.append(File.generated(config, uri, content=content))
    config.nav = fill(config.nav, [f.src_uri for f in found.documentation_pages()])
    return found


def on_page_markdown(markdown, **_):
    """Links to notebooks and folders lead to their pages."""
    markdown = re.sub(
        r"\]\(((?:\.\./)*notebooks/[\w.-]+)\.ipynb\)", r"](\1.md)", markdown
    )
    return re.sub(r"(\]\([\w./]*benchmarks/results)/?\)", r"\1/README.md)", markdown)


def fill(nav, uris):
    """The navigation with a sorted list of pages wherever a pattern stands.

    A page that is named elsewhere is not matched again.
    """
    named = set(_named(nav))

    def visit(item):
        if isinstance(item, dict):
            ((title, inside),) = item.items()
            return [{title: visit_all(inside) if isinstance(inside, list) else inside}]
        if "*" not in item:
            return [item]
        found = set(fnmatch.filter(uris, item)) - named
        return sorted(found, key=lambda uri: uri.removesuffix(".md"))

    def visit_all(items):
        return [found for item in items for found in visit(item)]

    return visit_all(nav)


def _named(nav):
    for item in nav if isinstance(nav, list) else [nav]:
        if isinstance(item, str):
            yield item
        else:
            for inside in item.values():
                yield from _named(inside)


# Notebooks


def notebook(path):
    """The pages and pictures of a notebook: cells and the outputs they were saved with."""
    uri = f"notebooks/{path.stem}"
    files, parts = {}, []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_with_formulas(source))
            continue
        parts.append(_fence(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{uri}-{len(files)}.png"
                files[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the code above]({Path(picture).name})")
            else:
                text = output.get("text") or data.get("text/plain", "")
                parts.append(_fence("".join(text), "text"))
    parts.append(f'<a href="{path.name}" download>This page as a notebook</a>')
    files[f"{uri}.md"] = "\n\n".join(parts)
    return files


def _fence(text, language):
    return f"````{language}\n{text.rstrip()}\n````"


def _with_formulas(source):
    # Browsers show MathML by themselves: no script has to be fetched.
    source = re.sub(
        r"\$\$(.+?)\$\$", lambda m: _formula(m[1], "block"), source, flags=re.DOTALL
    )
    return re.sub(r"\$([^$]+)\$", lambda m: _formula(m[1], "inline"), source)


def _formula(latex, display):
    math = convert(" ".join(latex.split()), display=display)
    # Markdown reads text between tags: hide what it would take for emphasis. A line
    # that began with <math> would be a block to it, hence the span.
    math = re.sub(
        r">([^<]+)<",
        lambda m: ">" + m[1].replace("*", "&#42;").replace("_", "&#95;") + "<",
        math,
    )
    return math if display == "block" else f"<span>{math}</span>"


# Reference


def reference():
    """A page for each public namespace, and one that lists all of them."""
    spaces = namespaces()
    pages = {
        f"reference/{name}.md": _page(name, spaces[name], spaces) for name in spaces
    }
    rows = ["# Reference", "Every public name, by namespace."]
    for name, space in spaces.items():
        names = (n for n in space["names"] if f"{name}.{n}" not in spaces)
        links = (f"[`{n}`]({name}.md#{name}.{n})" for n in names)
        heading = f"## [`{name}`]({name}.md) {{ #list-of-{name} }}"
        rows.append(f"{heading}\n\n{space['summary']}")
        rows.append(" · ".join(links))
    pages["reference/README.md"] = "\n\n".join(rows)
    return pages


def namespaces():
    """Public modules that list what they export: names, and where each is taken from."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _all(tree)
        if names is not None and not any(part.startswith("_") for part in parts):
            summary = (ast.get_docstring(tree) or "").split("\n\n")[0]
            found[".".join(parts)] = {
                "names": names,
                "taken": _taken(tree, ".".join(path.relative_to(ROOT).parent.parts)),
                "summary": html.escape(" ".join(summary.split()), quote=False),
            }
    return dict(sorted(found.items()))


def _all(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def _taken(tree, package):
    """Module and name there of what is imported, by the name that it has here."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            module = ".".join([*above, node.module or ""])
            found |= {a.asname or a.name: (module, a.name) for a in node.names}
    return found


def _elsewhere(name, exported, spaces):
    """Where a name is documented if not in this namespace: (module, name), or None."""
    module, original = spaces[name]["taken"].get(exported, (name, exported))
    if f"{name}.{exported}" in spaces:
        return f"{name}.{exported}", None
    outside = module.split(".")[0] != PACKAGE.name
    return (
        (module, original) if outside or module != name and module in spaces else None
    )


def _page(name, space, spaces):
    parts = [
        # The heading is mkdocstrings', whose text is no title of a page.
        f"---\ntitle: {name}\n---",
        f"::: {name}\n    options:\n      heading_level: 1\n      members: false\n"
        "      show_root_full_path: true",
    ]
    for exported in space["names"]:
        home = _elsewhere(name, exported, spaces)
        parts.append(
            _pointer(name, exported, *home) if home else f"::: {name}.{exported}"
        )
    return "\n\n".join(parts)


def _pointer(name, exported, module, original):
    heading = f"## `{exported}` {{ #{name}.{exported} .doc .doc-heading }}"
    if original is None:
        # The anchor of a namespace is on its own page.
        return f"## `{exported}`\n\nThe namespace [`{module}`]({module}.md)."
    full = f"{module}.{original}"
    if module.split(".")[0] == PACKAGE.name:
        return f"{heading}\n\nThis is [`{full}`]({module}.md#{full}), documented there."
    package = module.split(".")[0]
    return f"{heading}\n\nThis is `{full}`; the package {package} documents it."
