"""Writes the tables of the documents from those of benchmark/results: `python benchmark/documents.py`.

A table stands between `<!-- table N of FILE -->` and `<!-- end of table -->`, where FILE is a Markdown file of this
repository and N counts its tables from 1.
"""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PLACE = re.compile(r"<!-- table (\d+) of (\S+) -->\n.*?<!-- end of table -->", re.DOTALL)


def tables_of(text):
    """The tables of a Markdown text: a list of texts."""
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


def updated(text):
    """A document with its tables as they are in the files that they come from."""

    def table(place):
        number, path = place.groups()
        found = tables_of((REPOSITORY / path).read_text())[int(number) - 1]
        return f"<!-- table {number} of {path} -->\n{found}<!-- end of table -->"

    return PLACE.sub(table, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(updated(document.read_text()))
