"""Does the page about a run open in a browser without network, and show its pictures?

A run of `examples/` at a small size is trained, its report written and opened in a headless
Chromium that is offline. Every request is noted; every picture is taken off the screen and
compared, point by point, with the file that the page holds; the whole page is photographed.

Needs playwright (pip) and a Chromium, `chromium` or what CHROMIUM names.

Run: python -m benchmarks.report_page [EXAMPLE]
"""

import base64
import io
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks._harness import RESULTS, hardware, report, table
from trainax_pk import experiment

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SMALL = {
    "advection": ["training.num_steps=300", "training.log_every=5"],
    "kuramoto_sivashinsky": ["training.num_epochs=2", "training.log_every=5"],
}
WIDTH = 1100
_NATURAL = "e => [e.complete, e.naturalWidth, e.naturalHeight]"


def train(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The page of an example, trained for a little while."""
    run = experiment.read_run(EXAMPLES / f"{name}.yaml", SMALL.get(name, []))
    experiment.train(run, folder)
    return experiment.report(folder, rounds=1)


def correlation(shown: bytes, held: bytes) -> float:
    """Of the brightness of two pictures, the second brought to the size of the first.

    Both as means over 8 x 8 points: browsers and PIL draw a line of one point, brought to
    another size, half a point apart.
    """
    screen = Image.open(io.BytesIO(shown)).convert("L")
    own = Image.open(io.BytesIO(held)).convert("RGBA")
    paper = Image.new("RGBA", own.size, "white")
    flat = Image.alpha_composite(paper, own).convert("L").resize(screen.size)
    pair = [np.asarray(x.reduce(8), float).ravel() for x in (screen, flat)]
    return float(np.corrcoef(*pair)[0, 1])


def look(page_file: pathlib.Path, picture: pathlib.Path) -> dict[str, Any]:
    """What a browser does with the page."""
    requests: list[str] = []
    complaints: list[str] = []
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": WIDTH, "height": 900})
        context.set_offline(True)
        page = context.new_page()
        page.on("request", lambda r: requests.append(r.url))
        page.on("console", lambda m: complaints.append(m.text))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(page_file.as_uri())
        images = page.locator("img").all()
        rows = []
        for image in images:
            complete, width, height = image.evaluate(_NATURAL)
            held = base64.b64decode(image.get_attribute("src").partition(",")[2])
            alike = correlation(image.screenshot(), held)
            rows.append([image.get_attribute("alt"), width, height, complete, alike])
        page.screenshot(path=str(picture), full_page=True)
        found = {
            "browser": f"Chromium {browser.version}",
            "images": rows,
            "outside": [u for u in requests if not u.startswith(("file:", "data:"))],
            "complaints": complaints,
            "height": page.evaluate("document.documentElement.scrollHeight"),
            "overflow": page.evaluate(
                "document.documentElement.scrollWidth > window.innerWidth"
            ),
        }
        browser.close()
    return found


def main() -> None:
    """Prints and keeps the report, and the photograph beside it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "kuramoto_sivashinsky"
    picture = RESULTS / f"report_page_{hardware()}.png"
    with tempfile.TemporaryDirectory() as folder:
        found = look(train(name, pathlib.Path(folder)), picture)
    rows = [
        [alt, f"{width} x {height}", "yes" if complete else "**no**", f"{alike:.4f}"]
        for alt, width, height, complete, alike in found["images"]
    ]
    shown = all(x[3] and x[4] > 0.95 for x in found["images"]) and rows
    checks = [
        ("every picture is shown", shown),
        ("nothing is asked for outside of the page", not found["outside"]),
        ("the browser complains of nothing", not found["complaints"]),
        ("the page fits its window in width", not found["overflow"]),
    ]
    note = (
        f"`examples/{name}.yaml`, small; {found['browser']}, offline; {WIDTH} x "
        f"{found['height']} points. The page: [{picture.name}]({picture.name})."
    )
    pictures = table(["picture", "points", "loaded", "correlation with its file"], rows)
    report(
        "report_page",
        "Does the page about a run open without network, and show its pictures?",
        f"{note}\n\n{pictures}",
        "\n".join(f"- {text}: {'yes' if ok else '**no**'}." for text, ok in checks),
    )


if __name__ == "__main__":
    main()
